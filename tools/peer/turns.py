"""The worker's side of taking turns: run some steps, report them, wait. Standard library only.

Commands come as lines on stdin ("run N" or "stop"), reports leave as JSON lines on what was stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Turns:
    """Times steps from the start of one to the start of the next, so that nothing between them is lost."""

    def __init__(self) -> None:
        """Keep stdout for reports: whatever libraries print goes to stderr from here on."""
        self._reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._block: list[dict[str, Any]] = []
        self._step: dict[str, Any] | None = None
        self._left = 0
        self._ready: dict[str, Any] | None = {}
        self._since = 0.0

    def describe(self, **facts: Any) -> None:
        """What the first report says about this worker: versions, threads."""
        self._ready = facts

    def next_step(self) -> None:
        """Close the step that ends here and begin the next one, perhaps after a pause.

        Raises:
            SystemExit: the other side said stop, or is gone.
        """
        if self._step is not None:
            self._step["seconds"] = time.perf_counter() - self._since
            self._block.append(self._step)
            self._left -= 1
        if self._left == 0:
            self._report({"ready": self._ready} if self._step is None else {"steps": self._block})
            self._block = []
            command, _, count = sys.stdin.readline().strip().partition(" ")
            if command != "run":
                raise SystemExit(0)
            self._left = int(count)
        self._step = {}
        self._since = time.perf_counter()

    def note(self, **values: float) -> None:
        """Facts about the current step."""
        if self._step is not None:
            self._step |= values

    def add(self, phase: str, seconds: float) -> None:
        """Add to what the current step spent in `phase`."""
        if self._step is not None:
            self._step[phase] = self._step.get(phase, 0.0) + seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`with turns.phase("generate"): ...`"""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def _report(self, message: dict[str, Any]) -> None:
        self._reports.write(json.dumps(message) + "\n")
        self._reports.flush()
