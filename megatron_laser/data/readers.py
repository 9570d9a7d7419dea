"""JSON Lines and Parquet files to rows of problem and answer, and the hash that says which data a run saw."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laser.data.references import Reference, as_written, read_reference
from megatron_laser.data.surrogates import lone_surrogate
from megatron_laser.errors import DataError

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]

_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_PARQUET_SUFFIXES = (".parquet",)
_SHORT_FLOATS = {"float": np.float32, "halffloat": np.float16}  # Arrow's names
_PARQUET_BATCH = 1000  # rows in memory at once; worked solutions are long
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as read.

    Attributes:
        row: its number over all files, from 0.
        problem: the prompt column's text; of a conversation the last turn's.
        turns: (role, content) of the turns before that; () for a text.
        columns: the whole row as a JSON object, where a reward function may ask for it; else "".
        answer: the reference, as the reward function gets it.
        source: file and line (JSON Lines, from 1) or row (Parquet, from 0), for messages.
        taken_from: the form that the reference was taken out of, see `references`; "" where it stands as it is.
    """

    row: int
    problem: str
    answer: str
    source: str
    taken_from: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    columns: str = ""


def read_rows(
    paths: Paths,
    *,
    prompt_key: str,
    answer_key: str,
    mathematics: bool = True,
    options_key: str = "",
    first: int = 0,
    columns: bool = False,
) -> list[Row]:
    """Read all files, in the order given.

    Args:
        paths: one file or several: .jsonl, .ndjson or .parquet.
        prompt_key: field or column with the problem: a non-empty string, or a conversation, a list of
            {"role": ..., "content": ...} whose last turn is the user's.
        answer_key: field or column with the reference answer; `a.b` is b in the object a, unless a column is named so.
        mathematics: the references are for the mathematical grader (`rewards.is_math_verify`): numbers, lists
            of one and worked solutions give the answer in them. False: they are as written, everything but text as
            JSON, and may be empty.
        options_key: column with the options of a multiple-choice question, which become a part of its reference
            (`rewards.general.choices.read_choice`) in rows that have any; "": none is read.
        first: the first row's number, where other rows stand before these.
        columns: keep all columns of each row, in memory.

    Raises:
        DataError: a file is missing, unreadable or without rows, or a row does not fit; names file and line.
    """
    rows: list[Row] = []
    for path in _as_paths(paths):
        before = len(rows)
        keys = {"data.prompt_key": prompt_key, "data.answer_key": answer_key}
        for source, record in read_records(path, keys, optional=options_key, whole=columns):
            kept = _row_json(record) if columns else ""
            *turns, (_, problem) = _turns(record, prompt_key, source)
            if options_key and record.get(options_key) is not None:
                record = _with_options(record, answer_key, options_key)
            reference = _reference(record, answer_key, source, mathematics)
            rows.append(
                Row(
                    first + len(rows),
                    problem,
                    reference.text,
                    source,
                    reference.taken_from,
                    turns=tuple(turns),
                    columns=kept,
                )
            )
        if len(rows) == before:
            raise DataError(f"{path}: no rows; a data file needs at least one")
    return rows


def read_ids(path: str | PathLike[str], key: str) -> list[str | None]:
    """The problems' names in the order of `read_rows`, None for a row without one (or a file without any).

    Raises:
        DataError: the file is unreadable, or a name is no text; names file and line.
    """
    names: list[str | None] = []
    for source, record in read_records(Path(path), {"id_key": key}, required=False):
        value = record.get(key)
        names.append(None if value is None else str(value))
        _check_text(names[-1] or "", key, "id_key", source)
    return names


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


def read_records(
    path: Path,
    keys: Mapping[str, str] | None = None,
    *,
    required: bool = True,
    optional: str = "",
    whole: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line or row, record) of a file, streamed. Numbers with a point come as Decimal where that is exact.

    Args:
        keys: setting -> column; of a Parquet file only these are read. None: all of them.
        required: a Parquet file must have these columns.
        optional: a further column, which it may have.
        whole: read the other columns, too.

    Raises:
        DataError: see `read_rows`.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: not a file; name the .jsonl or .parquet files themselves")
    suffix = path.suffix.lower()
    if suffix in _JSONL_SUFFIXES:
        return _jsonl_records(path)
    if suffix in _PARQUET_SUFFIXES:
        return _parquet_records(path, keys, required, optional, whole)
    known = ", ".join(_JSONL_SUFFIXES + _PARQUET_SUFFIXES)
    raise DataError(f"{path}: unknown kind of file {suffix or '(no suffix)'!r}; expected {known}")


def _jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:  # bytes: only \n ends a line, a text's U+2028 does not
            for number, line in enumerate(file, start=1):
                source = f"{path}:{number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8"), parse_float=Decimal)
                except UnicodeDecodeError as error:
                    raise DataError(f"{source}: not UTF-8: {error.reason} at byte {error.start}") from error
                except (
                    ValueError,
                    ArithmeticError,
                    RecursionError,
                ) as error:  # also numbers of too many digits
                    raise DataError(f"{source}: not JSON: {error}") from error
                if not isinstance(record, dict):
                    raise DataError(
                        f"{source}: expected a JSON object on each line, found a {type(record).__name__}"
                    )
                yield source, record
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def import_pyarrow(path: Path) -> Any:
    """pyarrow with pyarrow.parquet: 0.1 s, and only for Parquet.

    Raises:
        DataError: it cannot be imported.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:  # releases from 26 on refuse NumPy 1
        raise DataError(
            f"{path}: Parquet needs pyarrow, which cannot be imported: {error}; this environment has NumPy "
            f"{importlib.metadata.version('numpy')}: upgrade it, install an older pyarrow (with NumPy 1: "
            "pip install 'pyarrow<26'), or write the data as .jsonl"
        ) from error
    return pyarrow


def _parquet_records(
    path: Path, keys: Mapping[str, str] | None, required: bool, optional: str, whole: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    pyarrow = import_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            named = {setting: _column_of(key, columns) for setting, key in (keys or {}).items()}
            for setting, key in named.items():
                if required and key not in columns:
                    raise DataError(_missing(key, setting, str(path), columns, "column"))
            wanted = [key for key in dict.fromkeys([*named.values(), optional]) if key in columns]
            short = [name for name in columns if str(file.schema_arrow.field(name).type) in _SHORT_FLOATS]
            if keys is not None and not wanted:
                yield from ((f"{path} row {number}", {}) for number in range(file.metadata.num_rows))
                return
            number = 0
            for batch in file.iter_batches(_PARQUET_BATCH, columns=None if whole or keys is None else wanted):
                for record in _batch_records(batch, path, number):
                    for name in short:
                        if record.get(name) is not None:
                            record[name] = _shortest(record[name], str(file.schema_arrow.field(name).type))
                    yield f"{path} row {number}", record
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}") from error


def _batch_records(batch: Any, path: Path, first: int) -> list[dict[str, Any]]:
    """The batch's rows; `first` is its first row's number in the file."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as whole:  # writers need not check what they call text
        for number in range(batch.num_rows):
            try:
                batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(f"{path} row {first + number}: not UTF-8: {error.reason}") from error
        raise DataError(f"{path}: not UTF-8: {whole.reason}") from whole


def _shortest(value: float, kind: str) -> Decimal:
    """The shortest decimal that reads back as this float32 or float16: as Python floats 0.1 is 0.10000000149011612."""
    return Decimal(str(_SHORT_FLOATS[kind](value)))


_ROLES = ("system", "user", "assistant")


def _turns(record: Mapping[str, Any], key: str, source: str) -> list[tuple[str, str]]:
    """(role, content) of a conversation; of a text, one turn of the user."""
    setting = "data.prompt_key"
    if key not in record:
        raise DataError(_missing(key, setting, source, list(record), "key"))
    value = record[key]
    if isinstance(value, str):
        turns = [("user", value)]
    elif isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
        turns = [(turn.get("role"), turn.get("content")) for turn in value]
    else:
        raise DataError(
            f"{source}: {key!r} ({setting}): expected a string, or a list of turns with role and content, found "
            f"{value!r:.80}"
        )
    for number, (role, content) in enumerate(turns, start=1):
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{source}: {key!r} ({setting}): turn {number} has role {role!r:.40} and content {content!r:.40}; "
                f"expected one of {', '.join(_ROLES)}, and a string"
            )
        _check_text(content, key, setting, source)
    if turns[-1][0] != "user":
        raise DataError(
            f"{source}: {key!r} ({setting}): the last turn is the {turns[-1][0]}'s; expected the user's, which the "
            "model answers"
        )
    if not turns[-1][1].strip():
        raise DataError(f"{source}: {key!r} ({setting}) is empty")
    return turns


def _with_options(record: Mapping[str, Any], key: str, options_key: str) -> dict[str, Any]:
    """The row with its options beside its answer, unless the answer is such an object by itself."""
    answer = record.get(key)
    if answer is None or isinstance(answer, dict) or (isinstance(answer, str) and answer.lstrip()[:1] == "{"):
        return dict(record)
    return {**record, key: {"answer": answer, "options": record[options_key]}}


def _reference(record: Mapping[str, Any], key: str, source: str, mathematics: bool) -> Reference:
    setting = "data.answer_key"
    found = value_at(record, key)
    if found is None:
        raise DataError(_missing(key, setting, source, list(record), "key"))
    (value,) = found
    if mathematics and isinstance(value, str) and not value.strip():
        raise DataError(f"{source}: {key!r} ({setting}) is empty")
    text = None if mathematics else as_written(value)
    reference = read_reference(value) if text is None else Reference(text)
    if text is None and not reference.text:
        raise DataError(
            f"{source}: {key!r} ({setting}): expected a text, a number or a list of one of them, found {value!r:.80}"
        )
    _check_text(reference.text, key, setting, source)
    return reference


def _column_of(key: str, columns: Sequence[str]) -> str:
    """The column that `key` is in: itself, or the part before its dot where only that is a column."""
    outer = key.partition(".")[0]
    return outer if key not in columns and outer in columns else key


def value_at(record: Mapping[str, Any], key: str) -> tuple[Any] | None:
    """The column `key`, or what `a.b` names in the object `a` where no column is named so; None where there is none."""
    return (record[key],) if key in record else _inner(record, key)


def _inner(record: Mapping[str, Any], key: str) -> tuple[Any] | None:
    """What `a.b` names in the object `a`; None where there is no such."""
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return (value,)


def _row_json(record: Mapping[str, Any]) -> str:
    """A row for a reward function: numbers as Python has them, times as text, and no bytes."""
    return json.dumps(
        {name: value for name, value in record.items() if not isinstance(value, bytes)}, default=_plain
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    return None if isinstance(value, bytes) else str(value)


def _check_text(text: str, key: str, setting: str, source: str) -> None:
    broken = lone_surrogate(text)
    if broken:
        raise DataError(
            f"{source}: {key!r} ({setting}) holds {broken}: correct it, or let tools/prepare_data.py drop the row"
        )


def _missing(key: str, setting: str, source: str, found: Sequence[str], kind: str) -> str:
    near = difflib.get_close_matches(key, found, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    names = ", ".join(repr(name) for name in found) or "none"
    return f"{source}: no {kind} {key!r} ({setting}).{hint} Found: {names}."
