"""Stage `train`: GRPO and LaSeR steps of the project's Trainer on bf16 layers of Qwen2.5-7B's shape, 8k sequences."""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from pathlib import Path

import torch

from gpu_day_one import qwen
from gpu_day_one.stage import Stage
from megatron_laser.benchmarks.measure import median_ratio, turns
from megatron_laser.config import RunConfig
from megatron_laser.config.model_folder.flops import forward_flops
from megatron_laser.config.plan.lines import STATE, UPDATE
from megatron_laser.config.plan.resolve import Plan, resolve_plan
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.model import platform
from megatron_laser.trainer.trainer import Trainer

GRPO, LASER = "GRPO", "LaSeR"
_PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 SXM by its data sheet
# The dry run's arithmetic is that of Transformer Engine's layers; torch's keep more for the backward of one layer.
_ROOM = 5 * 2**30
_MOST_LAYERS = 28


def run(stage: Stage) -> None:
    """Write the weights, find the number of layers that fits, then interleave the two kinds of step."""
    shape = stage.size(qwen.FULL, qwen.TOY)
    sizes = stage.size(
        qwen.Sizes(prompts=2, samples=4, response=8160, budget=16384),
        qwen.Sizes(prompts=2, samples=2, response=32, budget=128),
    )
    folder = stage.work / "qwen"
    shutil.rmtree(folder, ignore_errors=True)
    layers = 2 if stage.rehearse else _fitting_layers(folder, shape, sizes)
    while True:
        started = time.monotonic()
        qwen.write_model(folder, shape, layers)
        stage.note("weights", layers=layers, seconds=time.monotonic() - started)
        try:
            _interleave(stage, qwen.run_config(folder, sizes), shape, sizes, layers)
            break
        except torch.OutOfMemoryError as error:
            stage.note("out_of_memory", layers=layers, message=str(error)[:200])
        runtimes.stop()
        gc.collect()
        platform.empty_cache()
        layers -= 2
        if layers < 1:
            raise SystemExit("not even two layers fit")
    shutil.rmtree(folder, ignore_errors=True)


def _fitting_layers(folder: Path, shape: dict[str, int], sizes: qwen.Sizes) -> int:
    room = platform.free_memory_bytes() - _ROOM
    for layers in range(_MOST_LAYERS, 1, -1):
        qwen.write_config(folder, shape, layers)
        if _predicted(resolve_plan(qwen.run_config(folder, sizes), 1)) <= room:
            return layers
    raise SystemExit(f"two layers need more than the {room / 2**30:.1f} GiB that are free")


def _interleave(
    stage: Stage, config: RunConfig, shape: dict[str, int], sizes: qwen.Sizes, layers: int
) -> None:
    plan = resolve_plan(config, 1)
    _note_prediction(stage, plan)
    flat = qwen.rollouts(shape, layers, sizes)
    runtime = runtimes.start(config)
    laser = Trainer(config, runtime, score_token_id=2)
    plain = config.model_copy(update={"laser": config.laser.model_copy(update={"enabled": False})})
    # One model for both: two would leave each half the layers.
    trainers = {
        LASER: laser,
        GRPO: Trainer(plain, runtime, score_token_id=None, policy=laser.policy),
    }
    seconds, peaks = {GRPO: [], LASER: []}, {GRPO: 0, LASER: 0}
    for steps, (number, arm) in enumerate(turns((GRPO, LASER), stage.size(7, 2)), start=1):
        platform.reset_peak_memory_bytes()
        started = time.perf_counter()
        result = trainers[arm].train_step(flat, steps)
        platform.synchronize()
        spent = time.perf_counter() - started
        peaks[arm] = max(peaks[arm], platform.peak_memory_bytes())
        warm_up = number < stage.size(2, 1)
        if not warm_up:
            seconds[arm].append(spent)
        stage.note(
            "step",
            arm=arm,
            warm_up=warm_up,
            ms=spent * 1e3,
            peak_gib=platform.peak_memory_bytes() / 2**30,
            policy_loss=result.metrics["policy_loss"],
            grad_norm=result.metrics["grad_norm"],
            bad_steps=result.metrics["bad_steps"],
        )
    tokens = int(flat.lengths.sum())
    flops = _model_flops(plan, flat.lengths.tolist(), sizes.response * flat.num_samples)
    for arm in (GRPO, LASER):
        middle = statistics.median(seconds[arm])
        stage.note(
            "summary",
            arm=arm,
            layers=layers,
            tokens=tokens,
            ms=middle * 1e3,
            peak_gib=peaks[arm] / 2**30,
            predicted_gib=_predicted(plan) / 2**30,
            tokens_per_second=tokens / middle,
            mfu=None if stage.rehearse else flops / middle / _PEAK_FLOPS,
        )
    ratio, low, high = median_ratio(seconds[LASER], seconds[GRPO])
    stage.note("ratio", laser_over_grpo=ratio, low=low, high=high)
    runtimes.stop()


def _predicted(plan: Plan) -> int:
    """The dry run's bytes of an update: rollouts, saves and syncs do not happen here."""
    return sum(_lines(plan).values())


def _lines(plan: Plan) -> dict[str, int]:
    there = [line for line in plan.memory.lines if line.phase in (STATE, UPDATE)]
    return {line.name: line.bytes for line in there if "engine" not in line.name}


def _note_prediction(stage: Stage, plan: Plan) -> None:
    lines = {name: round(size / 2**30, 3) for name, size in _lines(plan).items()}
    stage.note("dry_run", update_gib=_predicted(plan) / 2**30, lines=lines)


def _model_flops(plan: Plan, lengths: list[int], labelled: int) -> float:
    """Of the old-policy pass (a forward) and the update (three times as much); what recomputation adds is not counted.

    The head works on labelled rows only; causal attention on half of each square.
    """
    arch = plan.architecture
    head = 2 * labelled * arch.vocab_size * arch.hidden_size
    return 4.0 * (sum(forward_flops(arch, length, 0) for length in lengths) + head)
