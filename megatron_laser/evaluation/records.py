"""One evaluated response, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_laser.data import DataError
from megatron_laser.files import plain, write_atomically
from megatron_laser.rewards.grade import FAILED_OUTCOMES


@dataclass(slots=True)
class EvaluationRecord:
    """One response to one problem.

    Attributes:
        row: of the problem in its data files, from 0. sample: of the response, from 0.
        response: text without the stop token. response_ids_length: tokens with it.
        finish_reason: stop, length (truncated), abort, or ended (for its prefix's score: `early_ending`).
        scored: the response ended in a stop token by itself, so it can have a score.
        reward: the verifier's. outcome: see `rewards.Grade`; or "ended", like the reason, and then nobody graded it: it
            counts as wrong.
        extracted: the last box's content, None without one.
        zc_logprob: log pi(score token | prompt, response), None if not scored (or no score token).
        score: r_s = beta * (zc_logprob - ref_logprob) on the scale of `laser.targets` (1: right, 0: wrong), None like
            `zc_logprob`.
        mean_logprob: mean log-prob of the response's tokens under sampling temperature; None if empty.
        answer_class: equal for equal answers to the same problem; None abstains.
        forced_zc_logprob, forced_score: of a response with a box that did not end by itself, behind an end token that
            it did not write: what the released evaluator calls its score (`released_convention`). None: not asked.
        source: the name of the problem's source; "" where there is one only.
        prefix_tokens, prefix_scores: after how many tokens a prefix was scored, increasing, and its scores; None: not
            asked.
    """

    row: int
    sample: int
    problem: str
    answer: str
    response: str
    response_ids_length: int
    finish_reason: str
    scored: bool
    reward: float
    outcome: str
    extracted: str | None
    zc_logprob: float | None
    score: float | None
    mean_logprob: float | None
    answer_class: int | None
    forced_zc_logprob: float | None = None
    forced_score: float | None = None
    source: str = ""
    prefix_tokens: list[int] | None = None
    prefix_scores: list[float] | None = None

    @property
    def right(self) -> bool:
        """The verifier's verdict."""
        return self.reward > 0.5

    @property
    def graded(self) -> bool:
        """False where grading itself failed: `right` is then no verdict on the response."""
        return self.outcome not in FAILED_OUTCOMES

    @property
    def verifiable(self) -> bool:
        """Whether it has a score and a verdict to compare it with."""
        return self.score is not None and self.graded


def record_fields(record: EvaluationRecord, *, prefixes: bool = True) -> dict[str, Any]:
    """Its fields as JSON can hold them; those of prefixes only where they were asked for, and `prefixes` is true."""
    fields = {name: plain(value) for name, value in asdict(record).items()}
    for name in ("prefix_tokens", "prefix_scores"):
        if fields[name] is None or not prefixes:
            del fields[name]
    return fields


def write_records(file: TextIO, records: Iterable[EvaluationRecord]) -> None:
    """Append one JSON line for each record and flush."""
    for record in records:
        file.write(json.dumps(record_fields(record), ensure_ascii=False) + "\n")
    file.flush()


def open_records(path: Path, known: dict[int, list[EvaluationRecord]]) -> TextIO:
    """The file, opened for appending, with nothing in it but the records in `known`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not known:
        return path.open("w", encoding="utf-8")
    with path.open(encoding="utf-8") as old:
        kept = [line for line in old if json.loads(line)["row"] in known]
    write_atomically(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def complete_records(path: Path, samples: Mapping[int, int]) -> dict[int, list[EvaluationRecord]]:
    """Row -> records, of the problems that have all their samples in the file; {} without a file.

    Args:
        samples: row -> how many it is to have.

    Raises:
        ValueError: as in `read_records`, but for a last line that a kill cut off.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomically(path, whole)
    problems: dict[int, list[EvaluationRecord]] = {}
    for record in read_records(path):
        problems.setdefault(record.row, []).append(record)
    return {
        row: records
        for row, records in problems.items()
        if [record.sample for record in records] == list(range(samples.get(row, 0)))
    }


def read_records(path: Path) -> list[EvaluationRecord]:
    """The records of a file that `write_records` wrote.

    Raises:
        DataError: a line is not a record; names it.
    """
    records: list[EvaluationRecord] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(EvaluationRecord(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path} line {number} is not an evaluation record: {error}; delete the file to have its responses "
                    "judged again"
                ) from error
    return records
