"""`status.json` of a run: what it is doing, how it ended, and the command that continues it, for scripts and people.

Rank 0 alone writes it. A run that was killed leaves what it said last: whether its process still lives is for the
reader to find out (the lock of the folder, `files.LOCK`; on the same host the process).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_laser.files import write_atomically
from megatron_laser.observability.quantities import utc_now

logger = logging.getLogger(__name__)

STATUS = "status.json"
State = Literal["starting", "running", "stopping", "stopped", "finished", "failed"]
ENDED: tuple[State, ...] = ("stopped", "finished", "failed")
_LOOKS_EVERY = 0.25  # seconds
_SIGN_OF_LIFE = 30.0  # seconds after which the same is written again, with the time


@dataclass(frozen=True)
class Status:
    """What status.json says.

    Attributes:
        step: the last complete one. steps: `run.steps`.
        phase: what is being done, in words; what was being done, where it has ended. phase_since: since when.
        checkpoint: the step of the last published one, None without one.
        reason: why it stops, has stopped or failed; else "".
        exit_status: of the process, None until it ends. 0 finished, 3 stopped and saved, 2 refused or cannot go on,
            1 a crash, 128 + n ended at once by signal n.
        time, started, phase_since: ISO 8601, UTC; of this writing, and of this start of the run.
        command: the shell command that continues the run.
    """

    state: State = "starting"
    step: int = 0
    steps: int = 0
    phase: str = ""
    phase_since: str = ""
    checkpoint: int | None = None
    reason: str = ""
    exit_status: int | None = None
    time: str = ""
    started: str = ""
    host: str = ""
    pid: int = 0
    world_size: int = 1
    command: str = ""

    @property
    def ended(self) -> bool:
        """Whether the run has said that it is over."""
        return self.state in ENDED


class StatusFile:
    """Keeps `folder`/status.json current from a thread of its own, so that no step waits for a disk.

    A failure to write is said once: the run goes on without it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        own: Callable[[], bool] = lambda: True,
        every: float = _LOOKS_EVERY,
        **first: Any,
    ) -> None:
        """Args: own: whether the folder is (still) this run's; first: fields of `Status`."""
        self._path = folder / STATUS
        self._own = own
        self._every = every
        self._fields: dict[str, Any] = {
            "started": utc_now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **first,
        }
        self._written: dict[str, Any] = {}
        self._at = 0.0
        self._since = ""
        self._failed = False
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self.flush()
        self._thread = threading.Thread(target=self._keep, name="status", daemon=True)
        self._thread.start()

    def update(self, **changed: Any) -> None:
        """Say something new; it is on the disk a moment later. Takes no lock: safe in a signal handler."""
        self._fields.update(changed)

    @property
    def status(self) -> Status:
        """What it says by now."""
        return Status(**self._fields)

    def flush(self) -> None:
        """Write what is new now. Not for signal handlers."""
        with self._writing:
            self._write()

    def close(self, **last: Any) -> None:
        """Write the last word; safe to call twice, of which the first counts."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        self.update(**last)
        self.flush()

    def _keep(self) -> None:
        while not self._closing.wait(self._every):
            self.flush()

    def _write(self) -> None:
        said = dict(self._fields)
        at = time.monotonic()
        if said == self._written and at - self._at < _SIGN_OF_LIFE:
            return
        if said.get("phase") != self._written.get("phase") or not self._since:
            self._since = utc_now()
        self._written, self._at = said, at
        try:
            if self._own() and self._path.parent.is_dir():  # never makes a folder that was taken away anew
                written = asdict(Status(**{**said, "phase_since": self._since, "time": utc_now()}))
                write_atomically(self._path, json.dumps(written, indent=1) + "\n")
        except OSError as error:
            if not self._failed:
                logger.warning("%s cannot be written: %s", self._path, error)
            self._failed = True


def read_status(folder: Path) -> Status | None:
    """What the run in `folder` has said last; None where it has said nothing, or nothing that can be read."""
    try:
        found = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        known = {field.name for field in fields(Status)}
        status = Status(**{name: value for name, value in found.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return status if status.state in get_args(State) else None
