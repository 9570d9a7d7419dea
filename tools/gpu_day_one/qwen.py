"""Random weights of Qwen2.5-7B's shape on disk, and the run that trains them: for stages `train` and `offload`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.benchmarks.step import StepBenchmark
from megatron_laser.config import RunConfig, load_config
from megatron_laser.model import platform
from megatron_laser.model.hf_folder import write_hf_folder

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
    config = Qwen2Config(
        **shape, num_hidden_layers=layers, max_position_embeddings=32768, rope_theta=1e6, eos_token_id=1,
        tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)


def write_model(folder: Path, shape: dict[str, int], layers: int) -> None:
    """config.json and random bf16 weights of `layers` layers, in place of the weights that are there."""
    write_config(folder, shape, layers)
    torch.manual_seed(0)
    write_hf_folder(
        _weights(shape, layers), folder, source=folder, dtype=torch.bfloat16, max_shard_bytes=2**30
    )


def _weights(shape: dict[str, int], layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    yield "model.embed_tokens.weight", _random(vocabulary, hidden)
    yield "model.norm.weight", _ones(hidden)
    yield "lm_head.weight", _random(vocabulary, hidden)
    for layer in range(layers):
        yield from _layer(f"model.layers.{layer}", shape)


def _layer(prefix: str, shape: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, middle = shape["hidden_size"], shape["intermediate_size"]
    head = hidden // shape["num_attention_heads"]
    keys = shape["num_key_value_heads"] * head
    for name, rows in (("q", hidden), ("k", keys), ("v", keys)):
        yield f"{prefix}.self_attn.{name}_proj.weight", _random(rows, hidden)
        yield f"{prefix}.self_attn.{name}_proj.bias", _random(rows, 1).squeeze(1)
    yield f"{prefix}.self_attn.o_proj.weight", _random(hidden, hidden)
    yield f"{prefix}.mlp.gate_proj.weight", _random(middle, hidden)
    yield f"{prefix}.mlp.up_proj.weight", _random(middle, hidden)
    yield f"{prefix}.mlp.down_proj.weight", _random(hidden, middle)
    yield f"{prefix}.input_layernorm.weight", _ones(hidden)
    yield f"{prefix}.post_attention_layernorm.weight", _ones(hidden)


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device=platform.device(), dtype=torch.bfloat16).mul_(0.02)


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


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
