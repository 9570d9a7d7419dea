"""All that torch allocates on a CPU, over time, by its allocator's own reports; spans say when.

torch's profiler hears of every block that the CPU allocator gives out and takes back, with its bytes and the time: of
tensors that Python never sees (a kernel's workspace, the copies inside a collective) as well as of those that it does.
Hooks on operations or on saved tensors miss the first. So the sum of the reports up to a moment is what is allocated
then. `tests/unit/test_memory_tracker.py` holds it against cases that are worked out by hand, collectives among them.

A block that was there before the tracker began is not known, nor is its end: begin before the model is built. An end in
a thread without the profiler's state is not heard of. Of gloo's threads that is the last thing that they do to a
collective, letting go of its tensors; so here who waits for a collective waits `_LET_GO` seconds more, after which
these are the caller's alone. Whether something got lost all the same shows: a step that is repeated must end where it
began (`benchmarks.memory` looks).

Outside of torch's allocator, and so not counted: Python, libraries' code, gloo's and oneDNN's buffers, mapped files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_PREFIX = "memory_tracker: "

_LET_GO = 0.01  # several turns of a busy processor's threads

Interval = tuple[int, int]  # nanoseconds of the profiler's clock


class MemoryTracker:
    """`with MemoryTracker() as tracker: ...`; figures can be asked for when it has ended."""

    def __init__(self) -> None:
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._times = self._live = np.zeros(0, np.int64)
        self._spans: dict[str, list[Interval]] = {}

    def __enter__(self) -> MemoryTracker:
        self._wait = dist.Work.wait

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            result = self._wait(work, *args, **kwargs)
            time.sleep(_LET_GO)
            return result

        dist.Work.wait = wait  # type: ignore[method-assign]
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        dist.Work.wait = self._wait  # type: ignore[method-assign]
        self._profile.__exit__(kind, value, trace)
        times, sizes = [], []
        for event in self._profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            name = event.name()
            if name == "[memory]":
                times.append(event.start_ns())
                sizes.append(event.nbytes())
            elif name.startswith(_PREFIX):
                interval = (event.start_ns(), event.start_ns() + event.duration_ns())
                self._spans.setdefault(name.removeprefix(_PREFIX), []).append(interval)
        order = np.argsort(np.array(times, np.int64), kind="stable")
        self._times = np.array(times, np.int64)[order]
        self._live = np.cumsum(np.array(sizes, np.int64)[order])
        for intervals in self._spans.values():
            intervals.sort()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Give a stretch of time a name; it may come several times."""
        with torch.profiler.record_function(_PREFIX + name):
            yield

    def spans(self, name: str) -> list[Interval]:
        """When the spans of this name were, in order; [] for none."""
        return list(self._spans.get(name, []))

    def live(self, moment: int) -> int:
        """Bytes that are allocated at a moment, of those since the tracker began."""
        place = int(np.searchsorted(self._times, moment, side="right"))
        return int(self._live[place - 1]) if place else 0

    def peak(self, intervals: Sequence[Interval]) -> int:
        """Most bytes that are allocated at once in any of `intervals`; 0 for none."""
        found = [0]
        for start, end in intervals:
            first, last = np.searchsorted(self._times, (start, end), side="right").tolist()
            found.append(max(self.live(start), int(self._live[first:last].max(initial=0))))
        return max(found)


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What is left of `intervals` when `others`, in order and apart from each other, are cut out."""
    left = []
    for start, end in intervals:
        for first, last in others:
            if first < end and last > start:
                left.append((start, max(start, first)))
                start = min(end, last)
        left.append((start, end))
    return [(start, end) for start, end in left if end > start]
