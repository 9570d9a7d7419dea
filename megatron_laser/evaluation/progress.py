"""How far an evaluation is, at what speed, and when it will be done: lines, or one that is rewritten on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

_EVERY_ON_TERMINAL = 0.2  # seconds between lines
_EVERY_IN_LOG = 15.0


class Progress:
    """Counts responses; speed and remaining time are of this attempt, not of what was there before."""

    def __init__(
        self,
        name: str,
        total: int,
        *,
        stream: TextIO | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            total: responses in all, those of earlier attempts included.
            stream: where to; default standard error.
            say: takes lines in the stream's place, as often as a log does.
        """
        self._name = name
        self._total = total
        self._stream = stream or sys.stderr
        self._say = say
        self._terminal = say is None and self._stream.isatty()
        self._lock = threading.Lock()
        self._done = self._new = self._tokens = 0
        self._started = self._shown = time.monotonic()

    def response(self, tokens: int, new: bool) -> None:
        """One more response of so many tokens; `new`: sampled by this attempt."""
        with self._lock:
            self._done += 1
            if not new:
                return
            self._new += 1
            self._tokens += tokens
            every = _EVERY_ON_TERMINAL if self._terminal else _EVERY_IN_LOG
            if time.monotonic() - self._shown >= every:
                self._show()

    def finish(self) -> None:
        """The last line."""
        with self._lock:
            self._show()
            if self._terminal:
                self._stream.write("\n")
                self._stream.flush()

    def line(self) -> str:
        """Where it stands."""
        spent = max(time.monotonic() - self._started, 1e-9)
        text = f"{self._name}: {self._done}/{self._total} responses ({self._done / max(self._total, 1):.0%})"
        if self._new:
            left = (self._total - self._done) * spent / self._new
            text += f", {self._tokens / spent:,.0f} tokens/s, {duration(left)} left"
        return text

    def _show(self) -> None:
        self._shown = time.monotonic()
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
