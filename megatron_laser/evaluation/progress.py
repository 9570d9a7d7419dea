"""How far an evaluation is, at what speed, and when it will be done: lines, or one that is rewritten on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_EVERY_ON_TERMINAL = 0.2  # seconds between lines
_EVERY_IN_LOG = 15.0


class Progress:
    """Counts responses, and says where it stands while it is open as a context manager.

    A thread says it, so that there are lines also while the first long responses are awaited, and while answers are
    graded. Speed and remaining time are of this attempt, not of what was there before.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        stream: TextIO | None = None,
        say: Callable[[str], None] | None = None,
        every: float | None = None,
    ) -> None:
        """
        Args:
            total: responses in all, those of earlier attempts included.
            stream: where to; default standard error.
            say: takes lines in the stream's place, from another thread.
            every: seconds between lines; default 0.2 on a terminal, else 15.
        """
        self._name = name
        self._total = total
        self._stream = stream or sys.stderr
        self._say = say
        self._terminal = say is None and self._stream.isatty()
        self._every = every or (_EVERY_ON_TERMINAL if self._terminal else _EVERY_IN_LOG)
        self._lock = threading.Lock()
        self._done = self._new = self._tokens = 0
        self._started = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="evaluation progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """To a stream, a last line where nothing failed."""
        self._closed.set()
        self._thread.join()
        if self._say is None:
            if error is None:
                self._show()
            if self._terminal:
                self._stream.write("\n")
                self._stream.flush()

    def response(self, tokens: int, new: bool) -> None:
        """One more response of so many tokens; `new`: sampled by this attempt."""
        with self._lock:
            self._done += 1
            if new:
                self._new += 1
                self._tokens += tokens

    def line(self) -> str:
        """Where it stands."""
        with self._lock:
            done, new, tokens = self._done, self._new, self._tokens
        spent = max(time.monotonic() - self._started, 1e-9)
        text = f"{self._name}: {done}/{self._total} responses ({done / max(self._total, 1):.0%})"
        if new:
            left = (self._total - done) * spent / new
            text += f", {tokens / spent:,.0f} tokens/s, {duration(left)} left"
        return text

    def _talk(self) -> None:
        while not self._closed.wait(self._every):
            self._show()

    def _show(self) -> None:
        if self._say is not None:
            self._say(self.line())
            return
        self._stream.write(f"\r\x1b[2K{self.line()}" if self._terminal else f"{self.line()}\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
