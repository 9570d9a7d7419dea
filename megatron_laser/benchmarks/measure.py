"""Time, peak memory and ratios of two arms; and what this device can do at best, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_laser.model import platform

_RESAMPLES = 2000

# A sample lasts at least this long, so that what the host needs for a launch and the clock does not count.
_SAMPLE_SECONDS = 0.02
_SAMPLES = 7


def seconds_per_call(call: Callable[[], object], *, samples: int = _SAMPLES) -> float:
    """Median seconds of one call, with the device's work finished; calls are repeated within a sample."""

    def sample(repeats: int) -> float:
        platform.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        platform.synchronize()
        return (time.perf_counter() - started) / repeats

    sample(1)  # builds kernels
    repeats = max(1, min(200, round(_SAMPLE_SECONDS / max(sample(2), 1e-9))))
    return statistics.median(sample(repeats) for _ in range(samples))


def host_seconds_per_call(call: Callable[[], object], *, samples: int = _SAMPLES) -> float:
    """Median seconds until a call returns while the device is idle; on a CPU that is the whole call."""
    seconds = []
    for _ in range(samples):
        platform.synchronize()
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    platform.synchronize()
    return statistics.median(seconds)


@dataclass(frozen=True)
class Ceilings:
    """flops: of a large square product in `dtype`, per second; bytes: read plus written per second by a copy."""

    device: str
    dtype: str
    flops: float
    bytes: float


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """Measure both on this process's device."""
    device = platform.device()
    size, copy_bytes = (8192, 2**30) if platform.has_cuda() else (1024, 2**26)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    gemm = seconds_per_call(lambda: torch.mm(left, right, out=product))
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_per_call(lambda: target.copy_(source))
    return Ceilings(
        platform.device_name(), str(dtype).removeprefix("torch."), 2 * size**3 / gemm, 2 * copy_bytes / copy
    )


def peak_allocated_bytes(call: Callable[[], None]) -> int:
    """Largest amount of tensor memory that is allocated during `call` on top of what was there before.

    On CUDA the caching allocator's statistics, on a CPU the profiler's record of every allocation and free.
    """
    if platform.has_cuda():
        before = platform.reset_peak_memory_bytes()
        call()
        return platform.peak_memory_bytes() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [
        event
        for event in profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    events.sort(key=lambda event: event.start_ns())
    current = peak = 0
    for event in events:
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def turns(arms: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, arm) of interleaved rounds: every arm once a round, in every second round from the last to the first.

    What slows the machine down for a while then slows all arms, and none is always the one behind another.
    """
    for number in range(rounds):
        for arm in arms if number % 2 else reversed(arms):
            yield number, arm


def interleaved_seconds(
    run: Callable[[str], object], arms: Sequence[str], *, rounds: int, warm_up: int = 0
) -> dict[str, list[float]]:
    """Seconds of `run(arm)`, arm -> a figure a round, after `warm_up` rounds that do not count; see `turns`."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number, arm in turns(arms, warm_up + rounds):
        started = time.perf_counter()
        run(arm)
        if number >= warm_up:
            seconds[arm].append(time.perf_counter() - started)
    return seconds


def median_ratio(figures: Sequence[float], over: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of figures / over, round by round: a 95 % bootstrap interval of the median, seed 0."""
    ratios = np.array(figures) / np.array(over)
    medians = np.median(np.random.default_rng(0).choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)
