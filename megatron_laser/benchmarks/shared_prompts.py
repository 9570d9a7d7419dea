"""What a group's prompt costs once instead of for every response: the train step, and generation in this process.

Both arms train the same weights on the same rollouts, and take turns in an order that is turned around from round to
round. A train step is the old-policy pass, the advantages, forward, backward and the optimizer. Generation is the
in-process engine's: every sample with a prompt of its own, and a prompt once for its samples and a beginning once for
all prompts.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.batching.shared_prompts import common_beginning
from megatron_laser.benchmarks.measure import interleaved_seconds, median_ratio
from megatron_laser.benchmarks.random_model import save_random_model
from megatron_laser.benchmarks.random_rollouts import random_rollouts
from megatron_laser.benchmarks.result import Result, aligned, provenance
from megatron_laser.config import load_config
from megatron_laser.config.model_folder.architecture import read_architecture
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.model import platform
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.types import SamplingParams

OWN, SHARED = "own", "shared"


@dataclass(frozen=True)
class Shape:
    """`prompts` groups of `samples` responses. common: tokens that all prompts begin with."""

    prompts: int
    samples: int
    prompt: int
    response: int
    common: int


@dataclass(frozen=True)
class Timed:
    """Seconds of each round for both arms, and the tokens that go through the model in a pass (train) or prefill."""

    work: str
    shape: Shape
    tokens: dict[str, int]
    seconds: dict[str, list[float]]

    @property
    def speedup(self) -> tuple[float, float, float]:
        """Median of own / shared, round by round, and a 95 % interval of that median."""
        return median_ratio(self.seconds[OWN], self.seconds[SHARED])


@dataclass(frozen=True)
class SharedPromptsResult(Result):
    """One entry for each shape and kind of work."""

    parameters: int
    timed: list[Timed]

    def table(self) -> str:
        """A table for people; tokens per second are those of prompts and responses, as the samples have them."""
        rows = [
            [
                "",
                "prompt",
                "response",
                "own tok/s",
                "shared tok/s",
                "speed-up",
                "95 % interval",
                "tokens computed",
            ]
        ]
        for one in self.timed:
            shape = one.shape
            useful = shape.prompts * shape.samples * (shape.prompt + shape.response)
            rates = [f"{useful / statistics.median(one.seconds[arm]):.0f}" for arm in (OWN, SHARED)]
            middle, low, high = one.speedup
            rows.append(
                [
                    *(one.work, str(shape.prompt), str(shape.response), *rates),
                    *(f"{middle:.2f}", f"{low:.2f} to {high:.2f}"),
                    f"{one.tokens[OWN]} to {one.tokens[SHARED]}",
                ]
            )
        shape = self.timed[0].shape
        return "\n".join(
            [
                f"prompts shared by a group, {self.parameters / 1e6:.1f}M parameters, {shape.prompts} prompts x "
                f"{shape.samples} responses, on {self.provenance}, {len(self.timed[0].seconds[OWN])} interleaved "
                "rounds",
                *aligned(rows),
            ]
        )


def bench_shared_prompts(
    model: Path | None,
    *,
    samples: int,
    prompts: int,
    lengths: list[tuple[int, int]],
    rounds: int,
    budget: int,
) -> SharedPromptsResult:
    """Time every (prompt, response) of `lengths` with the model of a folder, or a random one of 7M parameters."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model" if model is None else model.absolute()
        if model is None:
            save_random_model(folder, _small_model())
        file = Path(scratch) / "run.yaml"
        prompt, response = map(max, zip(*lengths))
        settings = {
            "model": {"path": str(folder), "dtype": "float32", "layers": "torch"},
            "data": {"train": str(file), "max_prompt_tokens": prompt},  # of which nothing is read
            "rollout": {
                "prompts_per_step": prompts,
                "samples_per_prompt": samples,
                "max_new_tokens": response,
            },
            "laser": {
                "score_token": 3,
                "ref_logprob": -20.0,
                "reasoning_warmup_steps": 0,
                "self_reward_warmup_steps": 0,
            },
            "optimizer": {"lr": 1e-6},
            "batching": {"tokens_per_micro_batch": budget},
            "run": {"steps": 1000, "output_dir": str(Path(scratch) / "run")},
        }
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        configs = {
            arm: load_config(file, [f"batching.share_prompts={str(arm == SHARED).lower()}"])
            for arm in (OWN, SHARED)
        }
        runtime = runtimes.start(configs[OWN])
        trainers = {OWN: Trainer(configs[OWN], runtime, score_token_id=3)}
        trainers[SHARED] = Trainer(configs[SHARED], runtime, score_token_id=3, policy=trainers[OWN].policy)
        engine = InProcessEngine(
            folder, dtype=torch.float32, device=platform.device(), max_batch_size=prompts * samples
        )
        vocabulary = read_architecture(folder).vocab_size
        timed = []
        for prompt, response in lengths:
            shape = Shape(prompts, samples, prompt, response, common=prompt * 3 // 4)
            flat = random_rollouts(**asdict(shape), ids=(4, vocabulary), eos=2)
            timed += [_train(trainers, flat, shape, rounds), _generate(engine, flat, shape, rounds)]
        runtimes.stop()
        parameters = sum(one.numel() for one in engine.named_parameters().values())
    return SharedPromptsResult(provenance(), parameters, timed)


def _small_model() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        eos_token_id=2,
    )


def _train(trainers: dict[str, Trainer], flat: FlatBatch, shape: Shape, rounds: int) -> Timed:
    step = 0

    def run(arm: str) -> None:
        nonlocal step
        step += 1
        trainers[arm].train_step(flat, step)
        platform.synchronize()

    tokens = {
        arm: sum(batch.tokens.numel() for batch in trainer.prepare(flat).micro_batches)
        for arm, trainer in trainers.items()
    }
    return Timed("train", shape, tokens, interleaved_seconds(run, (OWN, SHARED), rounds=rounds, warm_up=1))


def _generate(engine: InProcessEngine, flat: FlatBatch, shape: Shape, rounds: int) -> Timed:
    prompts = [flat.prompt_ids(group * shape.samples).tolist() for group in range(shape.prompts)]

    def run(arm: str) -> None:
        alone = arm == OWN
        engine.shares_beginnings = not alone
        sampling = SamplingParams(
            samples_per_prompt=1 if alone else shape.samples,
            max_new_tokens=shape.response,
            stop_token_ids=(),
            seed=1,
        )
        engine.generate(
            [prompt for prompt in prompts for _ in range(shape.samples if alone else 1)],
            sampling,
            deadline=3600.0,
        )

    once = shape.prompts * shape.prompt
    alike = common_beginning(prompts)
    tokens = {OWN: once * shape.samples, SHARED: once - (shape.prompts - 1) * alike}
    return Timed("generate", shape, tokens, interleaved_seconds(run, (OWN, SHARED), rounds=rounds, warm_up=1))
