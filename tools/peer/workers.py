"""The measuring side of taking turns: start a worker, let it run some steps, stop it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_LOG_LINES = 25


class WorkerError(RuntimeError):
    """A worker ended or fell silent; says which, and how its log ends."""


class Worker:
    """One trainer in a process of its own. It computes only during `run`."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, *, deadline: float
    ) -> None:
        """Start the process; `ready` waits for it.

        Args:
            deadline: seconds within which every report must come.
        """
        self.name = name
        self._log = log
        self._deadline = deadline
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                text=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def ready(self) -> dict[str, Any]:
        """What the worker says about itself, once it has loaded everything."""
        return self._receive()["ready"]

    def run(self, steps: int) -> list[dict[str, Any]]:
        """Let it run `steps` steps; one record for each."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"run {steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("has ended") from None
        return self._receive()["steps"]

    def close(self) -> None:
        """Tell it to stop, and kill it when it does not."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()  # the worker reads the end of the file as stop
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._messages.get(timeout=self._deadline)
        except queue.Empty:
            raise self._error(f"sent nothing for {self._deadline:g} s") from None
        if message is None:
            raise self._error("has ended")
        return message

    def _error(self, what: str) -> WorkerError:
        tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        return WorkerError("\n".join([f"the {self.name} worker {what}; its log {self._log} ends:", *tail]))
