"""All responses that a run has dumped, in columns: made in one pass by a thread, each response read again by seek.

Nothing of it is kept on the disk: 10,000 responses are read in about a second, and a run's folder may be read-only.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_laser.rewards.answer_forms import AnswerForm
from megatron_laser.viewer.growing_file import GrowingFile, Line, read_line

logger = logging.getLogger(__name__)

COLUMNS = (
    *("step", "row", "sample", "source", "reward", "score", "length", "finish"),
    *("outcome", "advantage", "answer"),
)
CODED = ("source", "finish", "outcome", "answer")
_FIELDS = {
    "length": "response_ids_length",
    "finish": "finish_reason",
}
_DUMP = re.compile(r"step_(\d+)\.jsonl")
_ANSWER_SHOWN = 200  # characters


class _Dump:
    """One file of rollouts. columns: of its responses; places: (offset, length) of their lines; groups: which lie
    together, as positions in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GrowingFile(path, up_to="token_ends")
        self.seen: tuple[int, int, int] | None = None
        self.has_tokens = False
        self.clear()

    def clear(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.places: list[tuple[int, int]] = []
        self.group_of: list[int] = []
        self.groups: list[list[int]] = []


class ResponseIndex:
    """Columns of all responses, in order of steps; a response's id is its place in them."""

    def __init__(self, folder: Path, form_of: Callable[[str], AnswerForm]) -> None:
        """Args: folder: `rollouts`. form_of: how a source's answers are read."""
        self.version = 0
        self.complete = False
        self._folder = folder
        self._form_of = form_of
        self._lock = threading.RLock()
        self._reading = threading.Lock()
        self._dumps: dict[int, _Dump] = {}
        self._order: list[_Dump] = []
        self._starts: list[int] = []
        self._tables: dict[str, dict[str, int]] = {name: {} for name in CODED}
        self._texts: dict[str, list[str]] = {name: [] for name in CODED}  # the same, by number
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def refresh(self, last_step: int | None) -> None:
        """Read new and changed dumps. Dumps of steps after `last_step` are from before the run was resumed: left out
        until they are written again."""
        with self._reading:
            changed = False
            files = self._files()
            with self._lock:
                for step in set(self._dumps) - {step for step, _ in files}:
                    del self._dumps[step]
            for step, path in files:
                if last_step is not None and step > last_step:
                    continue
                changed |= self._read(step, path)
                if changed and not self.complete:
                    self._publish(last_step)  # what is there so far, after each file of the first pass
            if changed or not self.complete or self._shown(last_step) != self._order:
                self.complete = True
                self._publish(last_step)

    def _files(self) -> list[tuple[int, Path]]:
        try:
            found = [
                (int(match[1]), path)
                for path in self._folder.iterdir()
                if (match := _DUMP.fullmatch(path.name))
            ]
        except OSError:
            return []
        return sorted(found)

    def _read(self, step: int, path: Path) -> bool:
        dump = self._dumps.setdefault(step, _Dump(path))
        try:
            status = path.stat()
        except OSError:
            return False
        seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        if seen == dump.seen:
            return False
        dump.seen = seen
        anew, lines = dump.file.new_lines()
        with self._lock:
            if anew:
                dump.clear()
            for line in lines:
                self._add(dump, line)
        return anew or bool(lines)

    def _add(self, dump: _Dump, line: Line) -> None:
        record, columns = line.record, dump.columns
        begins = not dump.places or (
            columns["row"][-1] != record.get("row")
            or (record.get("sample") or 0) <= (columns["sample"][-1] or 0)
        )
        if begins:
            dump.groups.append([])
        dump.groups[-1].append(len(dump.places))
        dump.group_of.append(len(dump.groups) - 1)
        dump.places.append((line.offset, line.length))
        dump.has_tokens = dump.has_tokens or line.cut
        answer = self._answer(record)
        for name in COLUMNS:
            value = answer if name == "answer" else record.get(_FIELDS.get(name, name))
            columns[name].append(self._code(name, value) if name in CODED else value)

    def _answer(self, record: dict[str, Any]) -> str | None:
        if isinstance(given := record.get("vote_answer"), str):
            return given[:_ANSWER_SHOWN]
        form = self._form_of(str(record.get("source") or ""))
        try:
            answer = form.extract(str(record.get("response") or ""), str(record.get("answer") or ""))
        except (ValueError, RecursionError):
            return None
        return None if answer is None else answer[:_ANSWER_SHOWN]

    def _code(self, name: str, value: Any) -> int | None:
        if value is None:
            return None
        table, text = self._tables[name], str(value)
        if text not in table:
            table[text] = len(table)
            self._texts[name].append(text)
        return table[text]

    def _shown(self, last_step: int | None) -> list[_Dump]:
        return [
            self._dumps[step]
            for step in sorted(self._dumps)
            if (last_step is None or step <= last_step) and self._dumps[step].places
        ]

    def _publish(self, last_step: int | None) -> None:
        with self._lock:
            order = self._shown(last_step)
            if order[: len(self._order)] == self._order and len(self._columns["step"]) == sum(
                len(dump.places) for dump in self._order
            ):
                added = order[len(self._order) :]
            else:  # something in the middle has changed: all places move
                added, self._columns, self._starts = order, {name: [] for name in COLUMNS}, []
            for dump in added:
                self._starts.append(len(self._columns["step"]))
                for name in COLUMNS:
                    self._columns[name] += dump.columns[name]
            self._order = order
            self.version += 1

    @property
    def count(self) -> int:
        """Responses that are known by now."""
        return len(self._columns["step"])

    @property
    def has_tokens(self) -> bool:
        """Whether some responses came with values for each token."""
        return any(dump.has_tokens for dump in self._order)

    def columns(self) -> dict[str, Any]:
        """{"count", "complete", "columns", "tables"} as the page reads them."""
        with self._lock:
            return {
                "count": self.count,
                "complete": self.complete,
                "columns": {name: list(values) for name, values in self._columns.items()},
                "tables": {name: list(texts) for name, texts in self._texts.items()},
            }

    def record(self, number: int) -> dict[str, Any] | None:
        """The line of a response; None: there is none of that id, or its file has changed just now."""
        with self._lock:
            found = self._place(number)
            if found is None:
                return None
            dump, own, _ = found
            path, place = dump.path, dump.places[own]
        return read_line(path, *place)

    def group(self, number: int) -> list[int]:
        """The ids of the responses to the same prompt in the same step, itself too."""
        with self._lock:
            found = self._place(number)
            if found is None:
                return []
            dump, own, start = found
            return [start + member for member in dump.groups[dump.group_of[own]]]

    def values(self, number: int, names: Sequence[str]) -> dict[str, Any]:
        """Columns of one response, codes written out."""
        with self._lock:
            found: dict[str, Any] = {}
            for name in names:
                value = self._columns[name][number]
                if name in CODED and value is not None:
                    value = self._texts[name][value]
                found[name] = value
            return found

    def _place(self, number: int) -> tuple[_Dump, int, int] | None:
        if not 0 <= number < self.count:
            return None
        low, high = 0, len(self._starts) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._starts[middle] <= number:
                low = middle
            else:
                high = middle - 1
        start, dump = self._starts[low], self._order[low]
        if number - start >= len(dump.places):  # it is being read anew
            return None
        return dump, number - start, start
