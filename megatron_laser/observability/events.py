"""What happened to a run, one line each in events.jsonl: starts, servers, checkpoints, fallbacks, stops, alarms.

Those who notice are layers apart (the client of the servers, the checkpoints, the recorder), so they write as one logs:
`note` goes to the file that is open in this process, which is rank 0's; elsewhere to none. `say` also prints the line.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from megatron_laser.files import write_atomically
from megatron_laser.observability.best_effort import BestEffort

_Course = Literal["start", "resume", "change", "signal", "stop", "finished", "end"]
_Result = Literal["checkpoint", "evaluation", "best", "alarm", "skipped"]
_Trouble = Literal["server", "fallback", "reward", "warning"]
Kind = _Course | _Result | _Trouble
"""start, end: of one start of the run, with its facts. fallback: something is done in another way from here on.
reward: of the code that grades. warning: anything else that was logged as one."""
FILE = "events.jsonl"


def _now() -> datetime:
    return datetime.now(UTC)


class EventLog:
    """Appends to `output_dir`/events.jsonl; best effort, from any thread."""

    def __init__(self, folder: Path, *, last_step: int, clock: Callable[[], datetime] = _now) -> None:
        """Open it and make it `note`'s; what an earlier start wrote of steps after `last_step` is cut off."""
        self.step = max(0, last_step)
        self.show: Callable[[str], object] = lambda line: None
        self._path = folder / FILE
        self._clock = clock
        self._lock = threading.Lock()
        self._writing = BestEffort(FILE)
        self._writing(lambda: cut_lines(self._path, last_step))
        global _open
        _open = self

    def add(self, kind: Kind, text: str, step: int | None = None, **facts: Any) -> None:
        """One event; `step`: by default the one that is being done. `facts`: further keys of its line, JSON values."""
        event = {
            "time": self._clock().isoformat(timespec="seconds"),
            "step": self.step if step is None else step,
            "kind": kind,
            "text": " ".join(text.split()),
            **facts,
        }
        with self._lock:
            self._writing(lambda: append_line(self._path, json.dumps(event, ensure_ascii=False)))

    def say(self, kind: Kind, text: str, step: int | None = None, **facts: Any) -> None:
        """`add`, and the same as a line for whoever looks at the run, with its step."""
        self.add(kind, text, step, **facts)
        self.show(f"step {self.step if step is None else step}: {' '.join(text.split())}")

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


def say(kind: Kind, text: str, step: int | None = None) -> bool:
    """`note`, and the same as a line above the run's live view; from any thread. Whether a log was open."""
    log = _open
    if log is not None:
        log.say(kind, text, step)
    return log is not None


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
