"""Stage `env`: what this machine is, and what it can do at best, cold and hot."""

from __future__ import annotations

import subprocess
import time

import torch

from gpu_day_one.stage import Stage
from megatron_laser.benchmarks.measure import measure_ceilings, seconds_per_call
from megatron_laser.model import platform

_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


def run(stage: Stage) -> None:
    """Versions, then products and copies."""
    try:
        from megatron_laser.cli.environment import describe

        stage.note("versions", found=describe())
    except Exception as error:  # a report must not stop the measurements
        stage.note("versions", failed=f"{type(error).__name__}: {error}"[:300])
    stage.note("machine", nvidia_smi=_said("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"))
    stage.note("compiler", nvcc=_said("nvcc", "--version"))
    dtype = torch.bfloat16 if platform.has_cuda() else torch.float32
    if stage.rehearse:
        size = 64
        square = torch.randn(size, size)
        seconds = seconds_per_call(lambda: square @ square, samples=2)
        stage.note("ceilings", tflops=2 * size**3 / seconds / 1e12)
        return
    if not platform.has_cuda():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device")
    cold = measure_ceilings(dtype)
    left, right = (torch.randn(8192, 8192, device=platform.device(), dtype=dtype) for _ in range(2))
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        for _ in range(20):
            torch.mm(left, right)
        platform.synchronize()
    hot = measure_ceilings(dtype)
    for state, found in (("cold", cold), ("hot", hot)):
        stage.note("ceilings", state=state, tflops=found.flops / 1e12, copy_gb_s=found.bytes / 1e9)
    from megatron_laser.ops import tiles

    # One product more and a float32 temporary in every backward where torch refuses it.
    stage.note("products", accumulate_in_place=tiles._accumulates_in_place(platform.device(), dtype))


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (done.stdout or done.stderr).strip()[-300:]
