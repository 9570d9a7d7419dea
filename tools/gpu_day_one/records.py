"""OUT/day_one.jsonl: one line a measurement, written and synced at once, from several processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

RUN = "run"  # the `what` of the runner's own lines


class Records:
    """The file of one folder."""

    def __init__(self, out: Path) -> None:
        self._file = out / "day_one.jsonl"

    def note(self, part: str, what: str = RUN, **fields: Any) -> None:
        """Append a line: the part, what was measured, and figures that JSON can hold."""
        line = json.dumps({"part": part, "what": what, "time": round(time.time()), **fields}, default=str)
        # One write to a file opened for appending: lines of parts side by side do not mix.
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a crash: a line of its own
            os.write(descriptor, b"\n" * cut_off + line.encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if what != RUN or fields.get("status") != "finished":
            print(line[:400], flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """All lines; one that a crash cut off is left out."""
        found = []
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
        return found

    def finished(self, *, rehearse: bool) -> set[str]:
        """Names of the parts that ran to their end; a rehearsal does not count as a run."""
        return {
            row["part"]
            for row in self.rows()
            if row["what"] == RUN
            and row.get("status") == "finished"
            and bool(row.get("rehearse")) == rehearse
        }
