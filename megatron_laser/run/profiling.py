"""Windows of a few steps in which torch's profiler is on: which ones, what is written, and phases in the traces.

Best effort: trouble is one warning, and no more windows. Outside a window nothing is done but, on CUDA, NVTX ranges.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from megatron_laser.config.schema.trials import ProfileConfig
from megatron_laser.model import platform
from megatron_laser.observability.best_effort import BestEffort
from megatron_laser.observability.timers import Timers

logger = logging.getLogger(__name__)

Mark = Callable[[str], AbstractContextManager[object]]
_HISTORY = 200_000  # allocations of the CUDA allocator's that are kept, about 100 MiB


class Windows:
    """One rank's windows. Every rank calls `step` for every step, so that all are of one mind."""

    def __init__(
        self,
        settings: ProfileConfig,
        output_dir: Path,
        timers: Timers,
        *,
        rank: int,
        steps: int,
        asked: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            timers: their phases are shown in traces, and in those of NVTX's tools (nsys) at any time.
            steps: the run's.
            asked: of how many steps a window somebody has asked for since the last call, the same on every rank; 0:
                of none.
        """
        self._settings = settings
        self._folder = output_dir / "profile"
        self._timers = timers
        self._rank, self._steps, self._asked = rank, steps, asked
        self._writes = settings.ranks == "all" or rank in settings.ranks
        self._window: tuple[int, int] | None = None
        self._trace: _Trace | None = None
        self._best_effort = BestEffort("logging.profile", Exception)
        self._mark = platform.phase_range if platform.has_cuda() and _works(platform.phase_range) else None
        timers.mark = self._mark

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around step `step`: open a window before it where one begins, and write what it saw after the last one."""
        self._window = self._window or self._due(step)
        if self._window is not None and self._trace is None and self._writes:
            self._best_effort(self._open)
        yield
        if self._window is not None and step >= self._window[1]:
            self.close()

    def close(self) -> None:
        """Write what an open window has seen so far; without one nothing."""
        trace = self._end()
        if trace is not None:
            self._best_effort(trace.write)

    def abandon(self) -> None:
        """Leave an open window without a word, after an error: what waits for the device might wait for ever."""
        trace = self._end()
        if trace is not None and not platform.has_cuda():
            self._best_effort(trace.stop)

    def _end(self) -> _Trace | None:
        trace, self._window, self._trace = self._trace, None, None
        self._timers.mark = self._mark
        return trace

    def _due(self, step: int) -> tuple[int, int] | None:
        """(first, last) of a window that begins with `step`."""
        asked, given = self._asked(), self._settings.steps
        if asked:
            window = (step, min(step + asked - 1, self._steps))
        elif (
            given is not None and given[0] <= step <= given[1]
        ):  # a run that was resumed inside has the rest of it
            window = (step, given[1])
        else:
            return None
        ranks = self._settings.ranks
        who = "all ranks" if ranks == "all" else f"rank {', '.join(map(str, ranks))}"
        logger.info("profiling steps %d to %d on %s: %s.*", *window, who, self._folder / _stem(window))
        return window

    def _open(self) -> None:
        assert self._window is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"{_stem(self._window)}.rank_{self._rank}"
        self._trace = _Trace(self._folder / stem, memory=self._settings.memory)
        self._timers.mark = record_function if self._mark is None else self._in_both

    @contextmanager
    def _in_both(self, phase: str) -> Iterator[None]:
        with platform.phase_range(phase), record_function(phase):
            yield


class _Trace:
    """A profiler that is on, until `write`."""

    def __init__(self, stem: Path, *, memory: bool) -> None:
        self._stem = stem
        cuda = platform.has_cuda()
        self._history = memory and cuda
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._profiler = profile(activities=activities, profile_memory=memory and not cuda)
        if self._history:
            platform.record_allocations(_HISTORY)
        self._profiler.start()

    def stop(self) -> None:
        """Write nothing."""
        self._profiler.stop()

    def write(self) -> None:
        """Each file is complete or not there."""
        with ExitStack() as stack:
            if self._history:
                stack.callback(platform.record_allocations, 0)
                snapshot = self._stem.with_name(self._stem.name + ".memory.pickle")
                stack.callback(_published, snapshot, platform.dump_allocations)
            self._profiler.stop()
            trace = self._stem.with_name(self._stem.name + ".trace.json.gz")
            _published(trace, lambda path: self._profiler.export_chrome_trace(str(path)))


def _works(mark: Mark) -> bool:
    """Whether a range can be entered: torch may be built without NVTX, and phases go on without it."""
    try:
        with mark("start"):
            return True
    except Exception as error:
        logger.warning("phases are no NVTX ranges: %s: %s", type(error).__name__, error)
        return False


def _published(target: Path, write: Callable[[Path], object]) -> None:
    partial = target.with_name(f".partial.{target.name}")  # the ending says how it is written
    try:
        write(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _stem(window: tuple[int, int]) -> str:
    return f"steps_{window[0]}-{window[1]}"
