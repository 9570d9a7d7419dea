"""A file of JSON lines that somebody else is still writing: only what is new is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

_BLOCK = 1 << 22


class Line(NamedTuple):
    """A complete line: where it lies in its file, in bytes with the line feed, and what it holds; `cut`: up to the name
    at which reading was to end."""

    offset: int
    length: int
    record: dict[str, Any]
    cut: bool = False


class GrowingFile:
    """Reads a file on from where it was read to, and from its beginning when it was replaced or cut back.

    A line is read once it ends in a line feed; one that is no JSON object (a killed run's) is passed over.
    """

    def __init__(self, path: Path, *, up_to: str = "") -> None:
        """Args: up_to: a name in the records before which their reading ends: long values that nobody needs follow."""
        self.path = path
        # Inside of JSON's strings a quote has a backslash before it, so this is the name and nothing that is said.
        self._up_to = f'"{up_to}":'.encode() if up_to else b""
        self._read = 0
        self._file = (0, 0)  # device and inode
        self._tail = b""  # the last bytes that were read: a file that was cut and written on has others there

    def new_lines(self) -> tuple[bool, list[Line]]:
        """(whether what was read before no longer holds, the lines since then). A file that is missing has none."""
        try:
            with self.path.open("rb") as file:
                anew = self._replaced(os.fstat(file.fileno()), file.fileno())
                if anew:
                    self._read, self._tail = 0, b""
                file.seek(self._read)
                return anew, list(self._lines(file))
        except OSError:
            anew = self._read > 0
            self._read, self._file, self._tail = 0, (0, 0), b""
            return anew, []

    def _replaced(self, status: os.stat_result, number: int) -> bool:
        same = (status.st_dev, status.st_ino)
        before, self._file = self._file, same
        if self._read == 0:
            return False
        if before != same or status.st_size < self._read:
            return True
        return os.pread(number, len(self._tail), self._read - len(self._tail)) != self._tail

    def _lines(self, file: Any) -> Iterator[Line]:
        left = b""
        while block := file.read(_BLOCK):
            left += block
            whole = left.rfind(b"\n") + 1
            if whole == 0:
                continue
            self._tail = left[max(0, whole - 64) : whole]
            start = 0
            while start < whole:
                end = left.index(b"\n", start) + 1
                cut = left.find(self._up_to, start, end) if self._up_to else -1
                text = left[start:end] if cut < 0 else left[start:cut].rstrip(b" ,") + b"}"
                if (record := parsed(text)) is not None:
                    yield Line(self._read + start, end - start, record, cut >= 0)
                start = end
            self._read += whole
            left = left[whole:]


def parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None: it holds none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def read_line(path: Path, offset: int, length: int) -> dict[str, Any] | None:
    """The record of one line; None: the file is gone or holds something else there by now."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return parsed(file.read(length))
    except OSError:
        return None
