"""Scores from a file, whoever gave them: as records of their own, or joined to the records of an evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.records import EvaluationRecord
from megatron_laser.rewards import GradingPool, equivalence_classes, extract_answer
from megatron_laser.rewards.grade import OUTCOMES
from megatron_laser.testtime.finished import FinishedBenchmark
from megatron_laser.testtime.scoring import json_rows

_PROBLEMS = ("row", "id", "problem", "prompt", "messages", "prompt_ids")
_LABELS = ("reward", "label")
_SHOWN = 3  # examples in a message


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """Which field has the score, and whether it is a logit: then 1 / (1 + e^-x) of it is the score."""

    key: str = "score"
    sigmoid: bool = False

    def read(self, row: Mapping[str, Any], place: str) -> float | None:
        """The score of a row, None where it says null.

        Raises:
            TestTimeError: there is none, or it is not a finite number.
        """
        if self.key not in row:
            raise TestTimeError(
                f"{place}: no `{self.key}`; a response without a score has null there. Name another field with "
                "--score-key"
            )
        value = row[self.key]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TestTimeError(f"{place}: `{self.key}` is {value!r}; expected a finite number, or null")
        if not self.sigmoid:
            return float(value)
        return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


@dataclass(frozen=True, slots=True)
class ScoredFile:
    """Records by benchmark, and what the file does not tell.

    Attributes:
        lengths_known: False: no tokens were counted, so nothing can be said by length.
        boxes_known: False: of a row neither `response` nor `extracted` says whether it has an answer.
        own_scores: the rows are those of `score` or of an evaluation: a response that was cut off has its score behind
            a forced end, or that is unknown. False: where a row has no score, nobody gave it one.
    """

    benchmarks: dict[str, list[EvaluationRecord]]
    lengths_known: bool
    boxes_known: bool
    own_scores: bool


def read_scored_file(path: Path, column: ScoreColumn, pool: GradingPool) -> ScoredFile:
    """Read JSON Lines with a score, a label and a problem in each row, see `megatron-laser metrics --help`.

    Args:
        pool: grades responses that have no label, and compares answers.

    Raises:
        TestTimeError: a row does not fit; names the line.
    """
    rows = list(json_rows(path))
    if not rows:
        raise TestTimeError(f"{path}: no rows; expected one JSON object on each line")
    numbers: dict[tuple[str, str], int] = {}
    counts: dict[tuple[str, int], int] = {}
    seen: dict[tuple[str, int, int], str] = {}
    records: list[tuple[str, str, dict[str, Any], EvaluationRecord]] = []
    for place, row in rows:
        benchmark = str(row.get("benchmark", path.stem))
        problem = _problem(row, place)
        number = numbers.setdefault((benchmark, problem), len(numbers))
        sample = row.get("sample", counts.get((benchmark, number), 0))
        if type(sample) is not int or sample < 0:
            raise TestTimeError(f"{place}: `sample` is {sample!r}; expected the response's number, from 0")
        counts[benchmark, number] = max(counts.get((benchmark, number), 0), sample + 1)
        first = seen.setdefault((benchmark, number, sample), place)
        if first != place:
            raise TestTimeError(
                f"{place}: response {sample} to this problem stands in {first} already; expected each response once"
            )
        records.append((benchmark, place, row, _record(row, place, number, sample, column)))
    _grade(records, pool)
    _classify(records, pool)
    benchmarks: dict[str, list[EvaluationRecord]] = {}
    for benchmark, _, _, record in records:
        benchmarks.setdefault(benchmark, []).append(record)
    return ScoredFile(
        benchmarks,
        lengths_known=all(record.response_ids_length > 0 for *_, record in records),
        boxes_known=all("response" in row or "extracted" in row for _, _, row, _ in records),
        own_scores=all("forced_score" in row for _, _, row, _ in records),
    )


def join_scores(
    finished: Sequence[FinishedBenchmark], path: Path, column: ScoreColumn
) -> dict[str, list[EvaluationRecord]]:
    """The records of an evaluation with the scores of a file in place of their own.

    A row of the file names a response by `row` (or the problem's `id`) and `sample`, and by `benchmark` where the
    evaluation has several.

    Raises:
        TestTimeError: a row does not fit, stands twice, names no response, or a response has no row.
    """
    by_name = {one.name: one for one in finished}
    rows_of_ids = {one.name: {name: row for row, name in one.ids().items()} for one in finished}
    open_ones = {(one.name, record.row, record.sample): record for one in finished for record in one.records}
    places: dict[tuple[str, int, int], str] = {}
    scores: dict[tuple[str, int, int], float | None] = {}
    for place, row in json_rows(path):
        name = row.get("benchmark", finished[0].name if len(finished) == 1 else None)
        if name not in by_name:
            raise TestTimeError(f"{place}: `benchmark` is {name!r}; expected one of {', '.join(by_name)}")
        number = row["row"] if "row" in row else rows_of_ids[name].get(str(row.get("id")))
        key = (name, number, row.get("sample"))
        if key in scores:
            raise TestTimeError(
                f"{place}: the response that it scores has a score from {places[key]} already"
            )
        if key not in open_ones:
            raise TestTimeError(
                f"{place}: {name} has no response with `row` {number!r} (`id` {row.get('id')!r}) and `sample` "
                f"{row.get('sample')!r}"
            )
        scores[key], places[key] = column.read(row, place), place
    if missing := [key for key in open_ones if key not in scores]:
        shown = "; ".join(f"{name} row {row} sample {sample}" for name, row, sample in missing[:_SHOWN])
        raise TestTimeError(
            f"{path}: {len(missing)} of the {len(open_ones)} responses have no row ({shown}); write "
            f"`{column.key}`: null for a response that got no score"
        )
    return {
        one.name: [
            replace(
                record,
                score=scores[one.name, record.row, record.sample],
                zc_logprob=None,
                forced_score=None,
                forced_zc_logprob=None,
            )
            for record in one.records
        ]
        for one in finished
    }


def _problem(row: Mapping[str, Any], place: str) -> str:
    key = next((key for key in _PROBLEMS if row.get(key) is not None), None)
    if key is None:
        raise TestTimeError(f"{place}: names no problem; expected one of {', '.join(_PROBLEMS)}")
    return json.dumps(row[key], sort_keys=True)


def _record(
    row: Mapping[str, Any], place: str, number: int, sample: int, column: ScoreColumn
) -> EvaluationRecord:
    """A row without grade (reward NaN) and class where it has none."""
    response = row.get("response", "")
    if not isinstance(response, str):
        raise TestTimeError(f"{place}: `response` is no text")
    score, ids = column.read(row, place), row.get("response_ids")
    length = row.get("response_ids_length", len(ids) if isinstance(ids, list) else 0)
    reward = _label(row, place)
    outcome = row.get("outcome", "correct" if reward > 0.5 else "wrong")
    if outcome not in OUTCOMES:
        raise TestTimeError(f"{place}: `outcome` is {outcome!r}; expected one of {', '.join(OUTCOMES)}")
    if math.isnan(reward) and not (response and isinstance(row.get("answer"), str | int | float)):
        raise TestTimeError(
            f"{place}: no label; expected `reward` (or `label`), or `response` and the reference `answer` to grade it"
        )
    return EvaluationRecord(
        row=number,
        sample=sample,
        problem="",
        answer=str(row.get("answer", "")),
        response=response,
        response_ids_length=length if type(length) is int else 0,
        finish_reason=str(row.get("finish_reason") or "stop"),
        scored=bool(row.get("scored", score is not None)),
        reward=reward,
        outcome=outcome,
        extracted=row["extracted"] if "extracted" in row else extract_answer(response),
        zc_logprob=_number(row, "zc_logprob", place),
        score=score,
        mean_logprob=_number(row, "mean_logprob", place),
        answer_class=row.get("answer_class"),
        forced_score=_number(row, "forced_score", place),
    )


def _label(row: Mapping[str, Any], place: str) -> float:
    key = next((key for key in _LABELS if row.get(key) is not None), None)
    if key is None:
        return math.nan
    value = row[key]
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise TestTimeError(f"{place}: `{key}` is {value!r}; expected a number from 0 (wrong) to 1 (right)")
    return float(value)


def _number(row: Mapping[str, Any], key: str, place: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TestTimeError(f"{place}: `{key}` is {value!r}; expected a finite number, or null")
    return float(value)


def _grade(records: Sequence[tuple[str, str, dict[str, Any], EvaluationRecord]], pool: GradingPool) -> None:
    """Give those without a label the verifier's."""
    ungraded = [record for *_, record in records if math.isnan(record.reward)]
    grades = pool.grade_many([(record.response, record.answer) for record in ungraded])
    for record, grade in zip(ungraded, grades, strict=True):
        record.reward, record.outcome = grade.reward, grade.outcome


def _classify(
    records: Sequence[tuple[str, str, dict[str, Any], EvaluationRecord]], pool: GradingPool
) -> None:
    """Put equal answers to a problem in one class, where the file does not say which are equal."""
    problems: dict[tuple[str, int], list[EvaluationRecord]] = {}
    for benchmark, _, row, record in records:
        if "answer_class" not in row:
            problems.setdefault((benchmark, record.row), []).append(record)
    for group in problems.values():
        classes = equivalence_classes([record.extracted for record in group], pool=pool)
        for record, number in zip(group, classes, strict=True):
            record.answer_class = number
