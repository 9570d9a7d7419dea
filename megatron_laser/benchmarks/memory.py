"""Peak memory of a call by torch's own allocation tracking, on CUDA and on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_laser.model import platform


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
