"""What happened to a run, one line each in events.jsonl: servers, checkpoints, stops, evaluations, alarms.

Those who notice are layers apart (the client of the servers, the checkpoints, the recorder), so they write as one logs:
`note` goes to the file that is open in this process, which is rank 0's; elsewhere to none.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from megatron_laser.files import write_atomically
from megatron_laser.observability.best_effort import BestEffort

Kind = Literal["server", "checkpoint", "stop", "resume", "skipped", "evaluation", "alarm", "finished"]
FILE = "events.jsonl"


def _now() -> datetime:
    return datetime.now(UTC)


class EventLog:
    """Appends to `output_dir`/events.jsonl; best effort, from any thread."""

    def __init__(self, folder: Path, *, last_step: int, clock: Callable[[], datetime] = _now) -> None:
        """Open it and make it `note`'s; what an earlier start wrote of steps after `last_step` is cut off."""
        self.step = max(0, last_step)
        self._path = folder / FILE
        self._clock = clock
        self._lock = threading.Lock()
        self._writing = BestEffort(FILE)
        self._writing(lambda: cut_lines(self._path, last_step))
        global _open
        _open = self

    def add(self, kind: Kind, text: str, step: int | None = None) -> None:
        """One event; `step`: by default the one that is being done."""
        event = {
            "time": self._clock().isoformat(timespec="seconds"),
            "step": self.step if step is None else step,
            "kind": kind,
            "text": " ".join(text.split()),
        }
        with self._lock:
            self._writing(lambda: append_line(self._path, json.dumps(event, ensure_ascii=False)))

    def close(self) -> None:
        """`note` goes nowhere from now on."""
        global _open
        if _open is self:
            _open = None


_open: EventLog | None = None


def note(kind: Kind, text: str, step: int | None = None) -> None:
    """Add an event to the log that is open in this process, if one is."""
    log = _open
    if log is not None:
        log.add(kind, text, step)


def append_line(path: Path, text: str) -> None:
    """One line in one write: a killed run leaves it whole, or a part that readers pass over.

    Raises OSError, also where a full disk took a part of it: the next line would go on in that.
    """
    line = text.encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, "only a part of a line was written", str(path))


def cut_lines(path: Path, last_step: int) -> None:
    """Keep the JSON lines of steps up to `last_step`, each with its line feed, so that the next one is a line of its
    own; a file that is missing or has nothing else is not touched."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(line + "\n" for line in text.splitlines() if _is_kept(line, last_step))
    if kept != text:
        write_atomically(path, kept)


def _is_kept(line: str, last_step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= last_step
    except (ValueError, KeyError, TypeError):
        return False
