#!/usr/bin/env python
r"""Turn a data set's files into the ones that data.train, data.validation and data.test read.

    python tools/prepare_data.py deepmath/*.parquet --output data/train.jsonl --test data/math500.jsonl
    python tools/prepare_data.py aime24.jsonl --output data/aime24.parquet --prompt-key question --answer-key solution

Reads JSON Lines and Parquet (DeepMath-103K, MATH-500, AIME and the like) and writes {problem, answer, id} as JSON
Lines or Parquet, by the suffix of --output. Rows without a problem or a usable answer (missing, empty, several in a
list, half of an emoji) are dropped, and so are repeated problems; each kind is counted, and the report names the first
ones.

Answers are taken out of the forms in which data sets have them: worked solutions that end in `#### 827` or hold a
\boxed{827}, lists of one, numbers (1e-07 is written 0.0000001, 204.0 as 204). Those that no response can equal (prose,
several lines, braces that do not match) are kept, counted and named; when they are most, nothing is written.
--answers-as-written leaves them alone, for free_text or a reward.function of your own.

    python tools/prepare_data.py mmlu_pro.parquet --choices options --output data/mmlu_pro.jsonl
    python tools/prepare_data.py gpqa_diamond.jsonl --choices 'Incorrect Answer 1' 'Incorrect Answer 2' \
        'Incorrect Answer 3' --answer-key 'Correct Answer' --output data/gpqa_diamond.jsonl

--choices makes multiple-choice problems for the verifier multiple_choice: of one column with all options (the answer is
a letter, a number from 0 or a text), or of several with the wrong ones, which are then put into an order that follows
from the problem. The options stand below the problem as A., B., ..., and in the answer beside the right letter.

With --test, problems that also stand in the test files stop the tool: training on them would make the test
worthless. --drop-overlap leaves them out instead. Problems are compared without blanks, dollar signs, LaTeX spacing
and \left and \right (megatron_laser/data/duplicates.py has the rules). Rows are streamed: memory is a short digest and
the answer of each problem.

Exit status: 0; 1 when train and test overlap, and for that alone; 2 when a file or its answers cannot be used; 3 when
the tool itself failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_laser.data import DataError, lone_surrogate, read_records
from megatron_laser.data.duplicates import comparable
from megatron_laser.data.readers import import_pyarrow
from megatron_laser.data.references import Reference, as_written, read_reference, why_unequal
from megatron_laser.files import replace_file
from megatron_laser.rewards.general.choices import LETTERS, read_choice

PROMPT_KEYS = ("problem", "question", "prompt", "Problem", "Question")
ANSWER_KEYS = ("answer", "final_answer", "Answer", "ground_truth", "reward_model.ground_truth")
ID_KEYS = ("id", "unique_id", "ID")
OVERLAP = "OVERLAP with the test files"
_OVERLAP = "problems also stand in the test files; nothing is written. Use --drop-overlap to leave them out"
_UNEQUAL = (
    "answers; nothing is written. Name the column with the final answers with --answer-key, or keep them as they are "
    "with --answers-as-written for a reward.function of your own"
)
_NAMED = 10  # rows of each kind that the report names
_BATCH = 1000  # rows of a Parquet batch


@dataclass
class Report:
    """What happened to the rows; `named` holds the first ones of each kind, `unequal` counts unreachable answers."""

    counts: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)
    unequal: int = 0

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


def value_at(record: dict[str, Any], key: str) -> Any:
    """record[key]; a dot goes into a nested object (reward_model.ground_truth). None where it is missing."""
    value: Any = record
    for part in [key] if key in record else key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def find_key(path: Path, wanted: str | None, known: Sequence[str], what: str) -> str:
    """`wanted`, or the first known key that has a value in the first row that has any of them."""
    candidates = [wanted] if wanted else known
    first: tuple[str, dict[str, Any]] | None = None
    for where, record in read_records(path):
        first = first or (where, record)
        for key in candidates:
            if value_at(record, key) is not None:
                return key
    if first is None:
        raise DataError(f"{path}: no rows; a data file needs at least one")
    raise DataError(
        f"{path}: no row has a value of {', '.join(map(repr, candidates))} for the {what}; {first[0]} has "
        f"{', '.join(map(repr, first[1]))}: name one with --{what}-key"
    )


def problem_text(value: Any) -> str | None:
    """The problem; of chat messages the last one by the user. None when there is none."""
    if isinstance(value, list):
        turns = [
            turn.get("content") for turn in value if isinstance(turn, dict) and turn.get("role") == "user"
        ]
        value = turns[-1] if turns else None
    return value.strip() if isinstance(value, str) and value.strip() else None


def digest(problem: str) -> bytes:
    """16 bytes that are the same for the same problem, however it is spaced and typeset."""
    return hashlib.blake2b(comparable(problem).encode(), digest_size=16).digest()


def reference(value: Any, options: argparse.Namespace) -> Reference:
    """The answer in a row; its text is empty when it cannot be used."""
    if options.answers_as_written or options.choices:
        return Reference(as_written(value) or "")
    return read_reference(value)


def choices(
    record: dict[str, Any], right: Any, columns: Sequence[str], problem: str
) -> tuple[str, str] | None:
    """(the problem with its options below it, the reference for multiple_choice); None where they do not fit."""
    if len(columns) == 1:
        options = value_at(record, columns[0])
        if isinstance(options, dict):  # {"text": [...], "label": [...]} of ARC and its like
            options = options.get("text")
    else:
        options = [right, *(value_at(record, column) for column in columns)]
    if not isinstance(options, list) or not all(isinstance(one, str) and one.strip() for one in options):
        return None
    options = [" ".join(option.split()) for option in options]
    if len(columns) > 1:
        right = options[0]
        options.sort(key=lambda option: hashlib.sha256(f"{problem}\n{option}".encode()).digest())
    try:
        reference = read_choice(json.dumps({"answer": right, "options": options}))
    except ValueError:
        return None
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
    answer = {"answer": reference.letter, "options": options}
    return f"{problem}\n\n{listed}", json.dumps(answer, ensure_ascii=False)


def rows(
    paths: Sequence[Path], options: argparse.Namespace, report: Report
) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, {problem, answer, id}) of the usable rows; the others are counted."""
    for path in paths:
        prompt_key = find_key(path, options.prompt_key, PROMPT_KEYS, "prompt")
        answer_key = find_key(path, options.answer_key, ANSWER_KEYS, "answer")
        for where, record in read_records(path):
            report.count("rows read")
            text = problem_text(value_at(record, prompt_key))
            value = value_at(record, answer_key)
            if options.choices and text is not None:
                found = choices(record, value, options.choices, text)
                if found is None:
                    report.count("dropped: no options, or an answer that is none of them", where)
                    continue
                text, value = found
            answer = reference(value, options)
            names = [record[key] for key in ID_KEYS if record.get(key) is not None]
            row = {"problem": text or "", "answer": answer.text, **({"id": str(names[0])} if names else {})}
            if text is None:
                report.count("dropped: no problem", where)
            elif not answer.text:
                several = isinstance(value, list) and len(value) > 1
                report.count(
                    f"dropped: {'several answers in a list' if several else 'no usable answer'}", where
                )
            elif broken := lone_surrogate(row):
                report.count("dropped: half of a surrogate pair, which is not text", f"{where}: {broken}")
            else:
                if answer.taken_from:
                    report.count(f"answer taken out of {answer.taken_from}", where)
                yield where, row


def digests_of_tests(options: argparse.Namespace) -> dict[bytes, str]:
    """Digest -> where it stands, for every problem of the --test files."""
    found: dict[bytes, str] = {}
    for path in options.test:
        key = find_key(path, options.test_prompt_key, PROMPT_KEYS, "test-prompt")
        for where, record in read_records(path):
            text = problem_text(value_at(record, key))
            if text is not None and not lone_surrogate(text):
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
            kind = "dropped: in the test files" if options.drop_overlap else OVERLAP
            report.count(kind, f"{where} = {tests[mark]}")
            continue
        report.count("written")
        why = "" if options.answers_as_written or options.choices else why_unequal(row["answer"])
        if why:
            report.unequal += 1
            report.count(f"WARNING, no response can equal the answer: {why}", where)
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
            self._arrow = pyarrow = import_pyarrow(output)
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
        replace_file(self._partial, self._output)


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
    add(
        "--answers-as-written",
        action="store_true",
        help="neither extract nor judge answers: for free_text, or a reward.function of your own",
    )
    add("--choices", nargs="+", metavar="COLUMN", help="of all options, or several: of the wrong ones")
    add("--report", type=Path, help="also write the counts and named rows as JSON")
    return parser.parse_args(values)


def prepare(options: argparse.Namespace, report: Report) -> str:
    """Write the file, unless there is a reason not to; returns that reason, "" for none.

    Raises:
        DataError, OSError: a file cannot be used.
    """
    if options.output.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"--output {options.output}: expected a name that ends in .jsonl or .parquet")
    with ExitStack() as stack:
        writer = Writer(options.output, stack)
        for row in unique_rows(options, report):
            writer.write(row)
        overlapping, written = (report.counts.get(kind, 0) for kind in (OVERLAP, "written"))
        reason = ""
        if overlapping:
            reason = f"{overlapping} {_OVERLAP}"
        elif not written:
            reason = "no rows are left; nothing is written"
        elif report.unequal > written / 2:
            reason = f"no response can equal {report.unequal} of {written} {_UNEQUAL}"
        else:
            writer.publish()
    return reason


def main(values: Sequence[str] | None = None) -> int:
    """Prepare the file; returns the exit status."""
    options = arguments(values)
    report = Report()
    try:
        reason = prepare(options, report)
        print("\n".join(report.lines()))
        if options.report is not None:
            content = {"counts": report.counts, "rows": report.named}
            options.report.write_text(json.dumps(content, indent=1) + "\n")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:  # Python's own status is 1, which says overlap
        traceback.print_exc()
        return 3
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1 if report.counts.get(OVERLAP) else 2
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
