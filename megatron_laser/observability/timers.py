"""Wall-clock seconds per phase of a step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from megatron_laser.observability.timeline import Span

_SPANS_KEPT = 10_000  # of a step, at most: nobody takes them with `logging.timeline_every: 0`


class Timers:
    """Accumulates seconds per phase until `collect`.

    Phases may be nested and may overlap, in one thread or several; each gets its full wall-clock time. A
    phase entered again while it runs is counted once.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Args: clock: seconds that never go back."""
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._running: list[str] = []  # in order of entry, once for each entry
        self._began: dict[str, float] = {}  # as `_since`, whatever was collected meanwhile
        self._spans: deque[Span] = deque(maxlen=_SPANS_KEPT)
        self.mark: Callable[[str], AbstractContextManager[object]] | None = None
        """What else is entered with each phase: a range for a profiler."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """`with timers("generate"): ...`"""
        with self._lock:
            if phase not in self._running:
                self._since[phase] = self._began[phase] = self._clock()
            self._running.append(phase)
        try:
            if self.mark is None:
                yield
            else:
                with self.mark(phase):
                    yield
        finally:
            with self._lock:
                self._remove_latest(phase)
                if phase not in self._running:
                    now = self._clock()
                    self._add(phase, now - self._since.pop(phase))
                    self._spans.append(Span(phase, self._began.pop(phase), now))

    @property
    def current(self) -> str:
        """The phase entered last among those that run, for error messages; "" between phases."""
        with self._lock:
            return self._running[-1] if self._running else ""

    def collect(self) -> dict[str, float]:
        """{"time/<phase>": seconds since the last call}; a running phase gives what it took so far."""
        with self._lock:
            now = self._clock()
            for phase, since in self._since.items():
                self._add(phase, now - since)
                self._since[phase] = now
            seconds, self._seconds = self._seconds, {}
        return {f"time/{phase}": value for phase, value in seconds.items()}

    def take_spans(self, origin: str) -> tuple[float, list[Span]]:
        """(the clock at the last start of the phase `origin`, the phases that ended since the last call in seconds from
        then); nothing of a time without it."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
        zero = next((span.start for span in reversed(spans) if span.phase == origin), None)
        if zero is None:
            return 0.0, []
        return zero, [Span(phase, start - zero, end - zero) for phase, start, end in spans]

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def _remove_latest(self, phase: str) -> None:
        position = len(self._running) - 1 - self._running[::-1].index(phase)
        del self._running[position]
