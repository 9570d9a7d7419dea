"""Held responses scored plainly: a transformers model, one forward for each, float64 from the logits on."""

import math
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.rollouts import R, T, W, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from megatron_laser.batching.flat import FlatBatch
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.observability.timers import Timers
from megatron_laser.trainer.score_drift import ScoreDrift
from megatron_laser.trainer.trainer import Trainer

# Of the first group two are scored, and of the second all: 5 of both, all of them for 3, 4 or 5.
GROUPS = [[R(5), T(9), W(12)], [W(2), R(4), W(6)], [R(7), R(3), T(4)]]
C_REF = -6.0


def drifting_trainer(
    folder: Path, model: Path, runtime: Runtime, *overrides: str, **sections: dict[str, Any]
) -> tuple[Trainer, ScoreDrift]:
    """A trainer whose weights a step moves a lot, and what measures on it after each step."""
    laser = {"drift_every": 1, "drift_samples": 4, "reasoning_warmup_steps": 0} | sections.pop("laser", {})
    settings = {"optimizer": {"lr": 1e-3}, "rollout": {"prompts_per_step": 4}} | sections
    config = run_config(folder, model, *overrides, laser=laser, **settings)
    (folder / "run").mkdir(exist_ok=True)
    trainer = Trainer(config, runtime, score_token_id=SCORE_TOKEN)
    return trainer, ScoreDrift(config, runtime, trainer, Timers(), score_token_id=SCORE_TOKEN)


def batch(seed: int) -> FlatBatch:
    """Of GROUPS, with random tokens."""
    return rollout_batch(GROUPS, seed=seed)


def trained(trainer: Trainer) -> PreTrainedModel | None:
    """The trainer's weights in a transformers model, which reads them as a folder; on rank 0 alone, but all call it."""
    weights = {name: tensor.clone().contiguous() for name, tensor in trainer.weight_stream()}
    if not trainer._runtime.is_main:
        return None
    with TemporaryDirectory() as folder:
        trainer.policy.chunks.hf.save_pretrained(folder)
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return model


@torch.no_grad()
def plain_logprobs(
    model: PreTrainedModel, flat: FlatBatch, samples: list[int], *, before_end: bool = False
) -> list[float]:
    """log pi(z_c) behind (or `before_end`: at) the last token of each of `samples`."""
    found = []
    for i in samples:
        ids = [*flat.prompt_ids(i).tolist(), *flat.response_ids(i).tolist()]
        logits = model(torch.tensor([ids])).logits[0].double()
        found.append(float(logits[-2 if before_end else -1].log_softmax(-1)[SCORE_TOKEN]))
    return found


def plain_metrics(flat: FlatBatch, samples: list[int], now: list[float], before: list[float]) -> dict:
    """What is reported of the log-probs of `samples`, by the formulas."""
    right = [value for i, value in zip(samples, now) if flat.rewards[i] == 1.0]
    wrong = [value for i, value in zip(samples, now) if flat.rewards[i] == 0.0]
    shift = np.subtract(now, before).tolist()
    return {
        "drift/held_step": 1.0,
        "drift/logprob_mean": statistics.mean(now),
        "drift/logprob_std": statistics.stdev(now) if len(now) > 1 else math.nan,
        "drift/shift": statistics.mean(shift),
        "drift/shift_std": statistics.stdev(shift),
        "drift/right": statistics.mean(right) - C_REF,
        "drift/wrong": statistics.mean(wrong) - C_REF,
    }
