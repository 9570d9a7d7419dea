"""JSON Lines and Parquet files to rows of problem and answer, and the hash that says which data a run saw."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import DataError

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]

_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_PARQUET_SUFFIXES = (".parquet",)
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as read.

    Attributes:
        row: its number over all files, from 0.
        problem: the prompt column's text.
        answer: the answer column's text.
        source: file and line (JSON Lines, from 1) or row (Parquet, from 0), for messages.
    """

    row: int
    problem: str
    answer: str
    source: str


def read_rows(paths: Paths, *, prompt_key: str, answer_key: str) -> list[Row]:
    """Read all files, in the order given.

    Args:
        paths: one file or several: .jsonl, .ndjson or .parquet.
        prompt_key: field or column with the problem, a non-empty string.
        answer_key: field or column with the reference answer, a non-empty string or an integer.

    Raises:
        DataError: a file is missing, unreadable or without rows, or a row does not fit; names file and line.
    """
    rows: list[Row] = []
    for path in _as_paths(paths):
        before = len(rows)
        for source, record in _records(path, (prompt_key, answer_key)):
            problem = _text(record, prompt_key, "data.prompt_key", source, integers=False)
            answer = _text(record, answer_key, "data.answer_key", source, integers=True)
            rows.append(Row(len(rows), problem, answer, source))
        if len(rows) == before:
            raise DataError(f"{path}: no rows; a data file needs at least one")
    return rows


def read_ids(path: str | PathLike[str], key: str) -> list[str | None]:
    """The problems' names in the order of `read_rows`, None for a row without one (or a file without any)."""
    path = Path(path)
    if path.suffix.lower() in _PARQUET_SUFFIXES:
        parquet = _pyarrow(path).parquet
        with parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                return [None] * file.metadata.num_rows
            values = [value for batch in file.iter_batches(columns=[key]) for value in batch[0].to_pylist()]
    else:
        values = [record.get(key) for _, record in _records(path, (key, key))]
    return [None if value is None else str(value) for value in values]


def fingerprint(paths: Paths, keys: Sequence[str]) -> str:
    """SHA-256 over the files' bytes, their order, and the keys read from them; as "sha256:HEX".

    File names do not count, so that a moved copy is the same data.

    Raises:
        DataError: a file is missing or unreadable.
    """
    total = hashlib.sha256(json.dumps(list(keys)).encode())
    for path in _as_paths(paths):
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(_HASH_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        total.update(digest.digest())
    return f"sha256:{total.hexdigest()}"


def _as_paths(paths: Paths) -> list[Path]:
    several = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    if not several:
        raise DataError("no data files: expected at least one path")
    return [Path(path) for path in several]


def _records(path: Path, keys: tuple[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: not a file; name the .jsonl or .parquet files themselves")
    suffix = path.suffix.lower()
    if suffix in _JSONL_SUFFIXES:
        return _jsonl_records(path)
    if suffix in _PARQUET_SUFFIXES:
        return _parquet_records(path, keys)
    known = ", ".join(_JSONL_SUFFIXES + _PARQUET_SUFFIXES)
    raise DataError(f"{path}: unknown kind of file {suffix or '(no suffix)'!r}; expected {known}")


def _jsonl_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open("rb") as file:  # bytes: only \n ends a line, a text's U+2028 does not
            for number, line in enumerate(file, start=1):
                source = f"{path}:{number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{source}: not UTF-8: {error.reason} at byte {error.start}") from error
                except (json.JSONDecodeError, RecursionError) as error:
                    raise DataError(f"{source}: not JSON: {error}") from error
                if not isinstance(record, dict):
                    raise DataError(
                        f"{source}: expected a JSON object on each line, found a {type(record).__name__}"
                    )
                yield source, record
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _pyarrow(path: Path) -> Any:
    """pyarrow with pyarrow.parquet: 0.1 s, and only for Parquet."""
    try:
        import pyarrow.parquet
    except ImportError as error:  # releases from 26 on refuse NumPy 1
        raise DataError(
            f"{path}: Parquet needs pyarrow, which cannot be imported: {error}; this environment has NumPy "
            f"{importlib.metadata.version('numpy')}: upgrade it, install an older pyarrow (with NumPy 1: "
            "pip install 'pyarrow<26'), or write the data as .jsonl"
        ) from error
    return pyarrow


def _parquet_records(path: Path, keys: tuple[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            for key, setting in zip(keys, ("data.prompt_key", "data.answer_key")):
                if key not in columns:
                    raise DataError(_missing(key, setting, str(path), columns, "column"))
            number = 0
            for batch in file.iter_batches(columns=list(dict.fromkeys(keys))):
                for record in batch.to_pylist():
                    yield f"{path} row {number}", record
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}") from error


def _text(record: Mapping[str, Any], key: str, setting: str, source: str, *, integers: bool) -> str:
    if key not in record:
        raise DataError(_missing(key, setting, source, list(record), "key"))
    value = record[key]
    if integers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        expected = "a string or an integer" if integers else "a string"
        raise DataError(f"{source}: {key!r} ({setting}): expected {expected}, found {value!r:.80}")
    if not value.strip():
        raise DataError(f"{source}: {key!r} ({setting}) is empty")
    return value


def _missing(key: str, setting: str, source: str, found: Sequence[str], kind: str) -> str:
    near = difflib.get_close_matches(key, found, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    names = ", ".join(repr(name) for name in found) or "none"
    return f"{source}: no {kind} {key!r} ({setting}).{hint} Found: {names}."
