"""Random weights of Qwen2.5-7B's shape on disk, and the run that trains them: for stages `train` and `offload`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.benchmarks.random_model import save_config, save_random_model
from megatron_laser.benchmarks.step import StepBenchmark
from megatron_laser.config import RunConfig, load_config
from megatron_laser.model import platform

FULL = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)
TOY = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)


@dataclass(frozen=True)
class Sizes:
    """Of one step: `prompts` x `samples` responses of `response` tokens, `budget` tokens a micro-batch."""

    prompts: int
    samples: int
    response: int
    budget: int


_RUN = """
model: {{path: {folder}, dtype: bfloat16, layers: torch, recompute: full}}
data: {{train: {folder}/unused.jsonl, max_prompt_tokens: 32}}
rollout: {{prompts_per_step: {prompts}, samples_per_prompt: {samples}, max_new_tokens: {response}}}
laser: {{enabled: true, score_token: 2, ref_logprob: -20.0, reasoning_warmup_steps: 0, self_reward_warmup_steps: 0,
        std_threshold: 0.0}}
batching: {{tokens_per_micro_batch: {budget}}}
run: {{steps: 1000, output_dir: {folder}/run}}
"""


def write_config(folder: Path, shape: dict[str, int], layers: int) -> None:
    """The config.json alone, which is all that a prediction needs."""
    save_config(folder, _config(shape, layers))


def write_model(folder: Path, shape: dict[str, int], layers: int) -> None:
    """config.json and random bf16 weights of `layers` layers, in place of the weights that are there."""
    save_random_model(
        folder,
        _config(shape, layers),
        vector_spread=0.02,
        dtype=torch.bfloat16,
        device=platform.device(),  # on a CPU the numbers of 7B would take minutes
    )


def _config(shape: dict[str, int], layers: int) -> Qwen2Config:
    return Qwen2Config(
        **shape, num_hidden_layers=layers, max_position_embeddings=32768, rope_theta=1e6, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip


def run_config(folder: Path, sizes: Sizes) -> RunConfig:
    """The run's configuration; responses of `sizes.response` tokens after prompts of 32."""
    file = folder / "run.yaml"
    text = _RUN.format(folder=folder, **vars(sizes))
    file.write_text(text, encoding="utf-8")
    return load_config(file, [])


def rollouts(shape: dict[str, int], layers: int, sizes: Sizes) -> FlatBatch:
    """A step's responses, of random tokens."""
    return StepBenchmark(
        prompts=sizes.prompts,
        samples=sizes.samples,
        response_length=sizes.response,
        hidden=shape["hidden_size"],
        layers=layers,
        vocabulary=shape["vocab_size"],
    ).rollouts()
