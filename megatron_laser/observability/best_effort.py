"""Best effort: what a run writes for people to look at must not end it. Told once when it fails, then off."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

logger = logging.getLogger(__name__)


class BestEffort:
    """TensorBoard, rollout dumps, the report: useful, and nothing that a run goes on from."""

    def __init__(self, what: str, *failures: type[Exception]) -> None:
        """Args: what: named in the warning. failures: what counts as one; OSError by default."""
        self._what = what
        self._failures = failures or (OSError,)
        self.on = True

    def __call__(self, work: Callable[[], object]) -> None:
        """Do `work`, unless it has failed before."""
        if not self.on:
            return
        try:
            work()
        except self._failures as error:
            self.on = False
            text = " ".join(str(error).split())
            logger.warning(
                "%s failed (%s: %s); it is off from now on, and the run goes on",
                self._what,
                type(error).__name__,
                text,
            )


class SafeOutput:
    """Standard output, or another text stream, that may be closed or full without harm to who writes to it.

    Everything but `write` and `flush` is the stream's own, so that it can be used in its place.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        # ValueError: the stream was closed in this process. rich ends the process on a broken pipe by itself.
        self._best_effort = BestEffort("writing to standard output", OSError, ValueError)

    def write(self, text: str) -> int:
        """Write `text`, if that is still possible; returns its length."""
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if that is still possible."""
        self._do(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _do(self, work: Callable[[], object]) -> None:
        on = self._best_effort.on
        self._best_effort(work)
        if on and not self._best_effort.on:
            _to_nowhere(self._stream)


def open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (`>&-`) empty ones.

    Otherwise `sys.stdout` is None, and the next files that are opened get the numbers that libraries print to.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) != number:
                raise
            os.set_inheritable(number, True)  # workers and servers have them, too
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def print_line(text: str) -> None:
    """Print one line on standard output, if that is still possible."""
    output = SafeOutput()
    output.write(text + "\n")
    output.flush()


def _to_nowhere(stream: TextIO) -> None:
    """What is left in the stream's buffer would make the interpreter's own flush at exit fail."""
    try:
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError):
        return
    os.dup2(nowhere, number)
    os.close(nowhere)
