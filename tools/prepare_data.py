#!/usr/bin/env python
"""Turn a data set's files into the ones that data.train, data.validation and data.test read.

    python tools/prepare_data.py deepmath/*.parquet --output data/train.jsonl --test data/math500.jsonl
    python tools/prepare_data.py aime24.jsonl --output data/aime24.parquet --prompt-key question --answer-key solution

Reads JSON Lines and Parquet (DeepMath-103K, MATH-500, AIME and the like) and writes {problem, answer, id} as JSON
Lines or Parquet, by the suffix of --output. Rows without a problem or a usable answer (missing, empty, neither text
nor a number) are dropped, and so are repeated problems; each kind is counted, and the report names the first ones.

With --test, problems that also stand in the test files stop the tool: training on them would make the test
worthless. --drop-overlap leaves them out instead. Problems are compared without spaces, case, dollar signs and LaTeX
spacing. Rows are streamed: memory is a short digest and the answer of each problem.

Exit status: 0, or 1 when train and test overlap, 2 when a file cannot be used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPT_KEYS = ("problem", "question", "prompt", "Problem", "Question")
ANSWER_KEYS = ("answer", "final_answer", "Answer", "ground_truth", "reward_model.ground_truth")
ID_KEYS = ("id", "unique_id", "ID")
_OVERLAP = "problems also stand in the test files; nothing is written. Use --drop-overlap to leave them out"
_NAMED = 10  # rows of each kind that the report names
_BATCH = 1000  # rows of a Parquet batch
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|[,;:! ])|[\s$~]")


class DataFileError(Exception):
    """A file that cannot be used."""


@dataclass
class Report:
    """What happened to the rows; `named` holds the first ones of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)

    def count(self, kind: str, where: str = "") -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if where and len(self.named.setdefault(kind, [])) < _NAMED:
            self.named[kind].append(where)

    def lines(self) -> list[str]:
        """Counts, and below each the rows that are named."""
        lines = []
        for kind, number in self.counts.items():
            lines.append(f"{number:8d}  {kind}")
            lines += [f"            {where}" for where in self.named.get(kind, ())]
        return lines


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line or row, record) of a .jsonl, .ndjson or .parquet file, streamed."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise DataFileError(f"{path}: no such file")
    if suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                number = 0
                for batch in table.iter_batches(batch_size=_BATCH):
                    for record in batch.to_pylist():
                        yield f"{path} row {number}", record
                        number += 1
        except pyarrow.ArrowException as error:
            raise DataFileError(f"{path}: not readable as Parquet: {error}") from error
    else:
        raise DataFileError(f"{path}: unknown kind of file {suffix!r}; expected .jsonl, .ndjson or .parquet")


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise DataFileError(f"{where}: not JSON: {error}") from error
    if isinstance(record, dict):
        return record
    raise DataFileError(f"{where}: expected a JSON object, found a {type(record).__name__}")


def value_at(record: dict[str, Any], key: str) -> Any:
    """record[key]; a dot goes into a nested object (reward_model.ground_truth). None where it is missing."""
    value: Any = record
    for part in [key] if key in record else key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def find_key(record: dict[str, Any], wanted: str | None, known: Sequence[str], what: str, where: str) -> str:
    """`wanted`, or the first known key that the record has."""
    candidates = [wanted] if wanted else known
    for key in candidates:
        if value_at(record, key) is not None or key in record:
            return key
    raise DataFileError(
        f"{where}: none of {', '.join(map(repr, candidates))} is there for the {what}; it has "
        f"{', '.join(map(repr, record))}: name one with --{what}-key"
    )


def problem_text(value: Any) -> str | None:
    """The problem; of chat messages the last one by the user. None when there is none."""
    if isinstance(value, list):
        turns = [
            turn.get("content") for turn in value if isinstance(turn, dict) and turn.get("role") == "user"
        ]
        value = turns[-1] if turns else None
    return value.strip() if isinstance(value, str) and value.strip() else None


def answer_text(value: Any) -> str | None:
    """The answer as text: numbers are written out, 204.0 as 204. None when it cannot be used."""
    if isinstance(value, float) and math.isfinite(value):
        value = str(int(value) if value.is_integer() else value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value.strip() if isinstance(value, str) and value.strip() else None


def digest(problem: str) -> bytes:
    """16 bytes that are the same for the same problem, however it is spaced and typeset."""
    text = unicodedata.normalize("NFKC", problem).casefold()
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return hashlib.blake2b(_SPACING.sub("", text).encode(), digest_size=16).digest()


def rows(
    paths: Sequence[Path], options: argparse.Namespace, report: Report
) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, {problem, answer, id}) of the usable rows; the others are counted."""
    for path in paths:
        keys: tuple[str, str] | None = None
        for where, record in read_records(path):
            if keys is None:
                keys = (
                    find_key(record, options.prompt_key, PROMPT_KEYS, "prompt", where),
                    find_key(record, options.answer_key, ANSWER_KEYS, "answer", where),
                )
            report.count("rows read")
            problem, answer = (value_at(record, key) for key in keys)
            text, reference = problem_text(problem), answer_text(answer)
            if text is None:
                report.count("dropped: no problem", where)
            elif reference is None:
                report.count("dropped: no usable answer", where)
            else:
                names = [record[key] for key in ID_KEYS if record.get(key) is not None]
                extra = {"id": str(names[0])} if names else {}
                yield where, {"problem": text, "answer": reference, **extra}


def digests_of_tests(options: argparse.Namespace) -> dict[bytes, str]:
    """Digest -> where it stands, for every problem of the --test files."""
    found: dict[bytes, str] = {}
    for path in options.test:
        key = ""
        for where, record in read_records(path):
            key = key or find_key(record, options.test_prompt_key, PROMPT_KEYS, "test-prompt", where)
            text = problem_text(value_at(record, key))
            if text is not None:
                found.setdefault(digest(text), where)
    return found


def unique_rows(options: argparse.Namespace, report: Report) -> Iterator[dict[str, str]]:
    """The rows to write: usable, each problem once, none in the test files."""
    tests = digests_of_tests(options)
    seen: dict[bytes, str] = {}
    for where, row in rows(options.inputs, options, report):
        mark = digest(row["problem"])
        if mark in seen:
            other = "" if seen[mark] == row["answer"] else ", with another answer"
            report.count(f"dropped: repeated{other}", where)
            continue
        seen[mark] = row["answer"]
        if mark in tests:
            kind = "dropped: in the test files" if options.drop_overlap else "OVERLAP with the test files"
            report.count(kind, f"{where} = {tests[mark]}")
            continue
        report.count("written")
        yield row


class Writer:
    """Rows to a .jsonl or .parquet file; `output` appears when `publish` is called."""

    def __init__(self, output: Path, stack: ExitStack) -> None:
        self._output = output = output.resolve()  # through a link, which stays
        self._partial = output.with_name(output.name + ".partial")
        self._parquet = output.suffix == ".parquet"
        self._stack = stack
        self._rows: list[dict[str, str]] = []
        output.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(lambda: self._partial.unlink(missing_ok=True))
        if self._parquet:
            import pyarrow
            import pyarrow.parquet

            self._arrow = pyarrow
            self._schema = pyarrow.schema([(name, pyarrow.string()) for name in ("problem", "answer", "id")])
            self._file = stack.enter_context(pyarrow.parquet.ParquetWriter(self._partial, self._schema))
        else:
            self._text = stack.enter_context(self._partial.open("w", encoding="utf-8"))

    def write(self, row: dict[str, str]) -> None:
        if not self._parquet:
            self._text.write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        self._rows.append(row)
        if len(self._rows) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def publish(self) -> None:
        if self._parquet:
            self._flush()
            self._file.close()
        else:
            self._text.close()
        os.replace(self._partial, self._output)


def arguments(values: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help=".jsonl, .ndjson or .parquet")
    add("--output", type=Path, required=True, help="file to write: .jsonl or .parquet")
    add("--prompt-key", help=f"default: the first of {', '.join(PROMPT_KEYS)}")
    add("--answer-key", help=f"default: the first of {', '.join(ANSWER_KEYS)}; a.b goes into a")
    add("--test", nargs="+", type=Path, default=[], metavar="FILE", help="test files to stay clear of")
    add("--test-prompt-key", help="as --prompt-key, for the --test files")
    add("--drop-overlap", action="store_true", help="leave out what the test files hold, and go on")
    add("--report", type=Path, help="also write the counts and named rows as JSON")
    return parser.parse_args(values)


def main(values: Sequence[str] | None = None) -> int:
    """Prepare the file; returns the exit status."""
    options = arguments(values)
    report = Report()
    try:
        if options.output.suffix not in (".jsonl", ".parquet"):
            raise DataFileError(f"--output {options.output}: expected a name that ends in .jsonl or .parquet")
        with ExitStack() as stack:
            writer = Writer(options.output, stack)
            for row in unique_rows(options, report):
                writer.write(row)
            overlapping = report.counts.get("OVERLAP with the test files", 0)
            written = report.counts.get("written", 0)
            if written and not overlapping:
                writer.publish()
    except (DataFileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(report.lines()))
    if options.report is not None:
        content = {"counts": report.counts, "rows": report.named}
        options.report.write_text(json.dumps(content, indent=1) + "\n")
    if overlapping or not written:
        reason = f"{overlapping} {_OVERLAP}" if overlapping else "no rows are left; nothing is written"
        print(f"error: {reason}", file=sys.stderr)
        return 1 if overlapping else 2
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
