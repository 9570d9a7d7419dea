"""Stage `offload`: a trainer's whole state leaves the device and returns, bit for bit."""

from __future__ import annotations

import shutil
import time

import torch
from helpers.runs import state_of

from gpu_day_one import qwen
from gpu_day_one.stage import Stage
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.model import platform
from megatron_laser.trainer.offload import ALL_PARTS, Part
from megatron_laser.trainer.trainer import Trainer


def run(stage: Stage) -> None:
    """One step, then twice off the device and back, and another step."""
    shape = stage.size(qwen.FULL, qwen.TOY)
    sizes = stage.size(
        qwen.Sizes(prompts=1, samples=2, response=2016, budget=4096),
        qwen.Sizes(prompts=1, samples=2, response=32, budget=128),
    )
    folder = stage.work / "qwen_offload"
    shutil.rmtree(folder, ignore_errors=True)
    qwen.write_model(folder, shape, 2)
    config = qwen.run_config(folder, sizes)
    flat = qwen.rollouts(shape, 2, sizes)
    trainer = Trainer(config, runtimes.start(config), score_token_id=2)
    trainer.train_step(flat, 1)
    state = trainer.policy.memory
    kept = ALL_PARTS - {Part.GRADIENTS}
    before = _bits(trainer)
    for number in range(2):
        free = platform.free_memory_bytes()
        started = time.monotonic()
        freed = state.offload(ALL_PARTS)
        away = time.monotonic() - started
        given_back = platform.free_memory_bytes() - free
        started = time.monotonic()
        state.onload(ALL_PARTS)
        back = time.monotonic() - started
        same = all(torch.equal(one, other) for one, other in zip(before, _bits(trainer), strict=True))
        stage.note(
            "round_trip",
            number=number,
            parts=sorted(part.value for part in kept),
            gib=freed / 2**30,
            offload_seconds=away,
            load_seconds=back,
            device_gained_gib=given_back / 2**30,
            bitwise=same,
        )
        if not same:
            raise SystemExit("the state that came back differs from the one that left")
        if not stage.rehearse and given_back < freed:
            raise SystemExit(f"{freed} bytes left the trainer, and the device has only {given_back} more")
    metrics = trainer.train_step(flat, 2).metrics
    stage.note("step_after", grad_norm=metrics["grad_norm"], bad_steps=metrics["bad_steps"])
    runtimes.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _bits(trainer: Trainer) -> list[torch.Tensor]:
    """Copies on the host of the parameters, main weights and Adam's moments."""
    return [tensor.detach().to("cpu", copy=True) for tensor in state_of(trainer)]
