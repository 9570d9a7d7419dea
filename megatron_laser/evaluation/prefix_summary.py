"""What scores of prefixes are worth: how early they know right from wrong, and what ending by them would save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_laser.algorithms.metrics import FloatArray, auroc, bootstrap_interval
from megatron_laser.algorithms.voting import voting_curves
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.prefix_rule import PrefixRule
from megatron_laser.evaluation.records import EvaluationRecord
from megatron_laser.evaluation.summary import by_problem, no_votes

MOST_ROWS = 10
DEFAULT_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
_LEVEL = 0.95
_AUROC_RESAMPLES = 400  # each one sorts all scores of a row


@dataclass(frozen=True, slots=True)
class StopBelow:
    """Which scores of prefixes end a response.

    thresholds: on the scale of the score, 1 right and 0 wrong. end_early: whether generation itself ends, at the one
    threshold; else the responses are whole, and what ending would have done is computed from them.
    """

    thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
    end_early: bool = False

    @classmethod
    def parse(cls, text: str | None, *, end_early: bool) -> StopBelow:
        """Of `--stop-below`, numbers with commas between, and `--end-early`. Raises TestTimeError."""
        if text is None:
            if end_early:
                raise TestTimeError("--end-early: give the score below which responses end with --stop-below")
            return cls()
        try:
            thresholds = tuple(sorted({float(part) for part in text.split(",")}))
        except ValueError:
            thresholds = ()
        if not thresholds or not all(math.isfinite(threshold) for threshold in thresholds):
            raise TestTimeError(f"--stop-below {text!r}: expected numbers such as 0.2 or 0.1,0.2,0.3")
        if end_early and len(thresholds) > 1:
            raise TestTimeError(
                f"--stop-below {text} with --end-early: generation ends at one threshold; give one"
            )
        return cls(thresholds, end_early)


def prefix_detail(
    records: Sequence[EvaluationRecord], rule: PrefixRule, stop: StopBelow, *, seed: int = 0
) -> dict[str, Any]:
    """What results.json has of an evaluation's prefixes.

    Returns:
        `rule`, see `PrefixRule.settings`, and `name`. Of whole responses `by_position` and `end` (`auroc_by_position`)
        and `stop_below` (`stop_curve`); of responses that were ended early `ended` (`ended_early`) in their place: what
        these would have become nobody knows.
    """
    detail: dict[str, Any] = {"name": rule.name, "rule": rule.settings()}
    if stop.end_early:
        return detail | {"ended": ended_early(records, stop.thresholds[0], ordinal=not rule.every)}
    return (
        detail
        | auroc_by_position(records, ordinal=not rule.every, seed=seed)
        | {"stop_below": stop_curve(records, stop.thresholds, seed=seed)}
    )


def auroc_by_position(
    records: Sequence[EvaluationRecord], *, ordinal: bool, most: int = MOST_ROWS, seed: int = 0
) -> dict[str, Any]:
    """How well the scores of prefixes tell responses that will be right from those that will be wrong.

    Only responses that were graded count. Where there are more places than `most`, neighbours share a row, about
    equally many scores in each; a response then counts once, by its last prefix in the row.

    Args:
        ordinal: a place is called by its number in the response, 1 for the first one; else by the tokens before it.
        seed: of the bootstrap over problems.

    Returns:
        by_position: `first`, `last` place; `tokens`, the mean number before it; `responses` that go on there, the share
            `right` of them; `score_right_mean`, `score_wrong_mean`; `auroc` with `low` and `high`; `end_auroc`, of the
            score of the end where the same responses have one.
        end: `responses` that have a score of the end, their share `right`, the means, and `auroc`, `low`, `high`.
    """
    problems = by_problem([record for record in records if record.graded])
    rows = [
        {"first": low, "last": high, **_row(problems, _last_in(low, high, ordinal), seed, with_end=True)}
        for low, high in _groups([_places(record, ordinal) for group in problems for record in group], most)
    ]
    return {"by_position": rows, "end": _row(problems, _of_end, seed)}


def stop_curve(
    records: Sequence[EvaluationRecord],
    thresholds: Sequence[float],
    *,
    seed: int = 0,
    subsets: int = 200,
    num_resamples: int = 1000,
) -> list[dict[str, Any]]:
    """What ending responses at the first prefix with a score below a threshold would have done, from whole responses.

    An ended response counts as wrong, gives no vote, and costs the tokens up to its end.

    Returns:
        For no threshold (None) and for each: `threshold`; the shares `ended` of all responses, `right_ended` of the
        right ones, `tokens_saved` of all tokens; `accuracy`, and with all K responses of a problem `majority` and
        `weighted_majority` (left out where votes, or scores of ends, are not available), each with its `change` by
        ending and the change's 95 % interval over problems, `low` and `high`.
    """
    problems = by_problem(records)
    ways = ["accuracy"]
    if not no_votes(records):
        # Ending leaves ever fewer scores of ends: whether there are any is said once, so that rows have the same keys.
        ways += ["majority", *["weighted_majority"] * any(record.score is not None for record in records)]
    whole = _choices(problems, ways, seed, subsets)
    tokens = sum(record.response_ids_length for record in records)
    rows = []
    for threshold in (None, *thresholds):
        ended = [
            [_ends_at(record, -math.inf if threshold is None else threshold) for record in problem]
            for problem in problems
        ]
        left = [
            [_ended(record) if end is not None else record for record, end in zip(*pair, strict=True)]
            for pair in zip(problems, ended, strict=True)
        ]
        flat = [pair for pairs in zip(problems, ended, strict=True) for pair in zip(*pairs, strict=True)]
        right = [end for record, end in flat if record.right]
        saved = sum(record.response_ids_length - end for record, end in flat if end is not None)
        values = whole if threshold is None else _choices(left, ways, seed, subsets)
        rows.append(
            {
                "threshold": threshold,
                "ended": sum(end is not None for _, end in flat) / len(flat),
                "right_ended": sum(end is not None for end in right) / len(right) if right else math.nan,
                "tokens_saved": saved / tokens if tokens else math.nan,
                **{name: _changed(value, whole[name], seed, num_resamples) for name, value in values.items()},
            }
        )
    return rows


def ended_early(
    records: Sequence[EvaluationRecord], threshold: float, *, ordinal: bool, most: int = MOST_ROWS
) -> dict[str, Any]:
    """What generation that ends early has cost.

    Returns:
        `threshold`; `responses`, `ended` of them; `tokens` that were generated, `tokens_of_ended` among them;
        by_position: `first` and `last` place, as in `auroc_by_position`, `responses` that were scored there and
        `ended` there.
    """
    ended = [record for record in records if record.finish_reason == "ended"]
    rows = []
    for low, high in _groups([_places(record, ordinal) for record in records], most):
        inside = [[low <= place <= high for place in _places(record, ordinal)] for record in records]
        rows.append(
            {
                "first": low,
                "last": high,
                "responses": sum(any(places) for places in inside),
                "ended": sum(low <= _ending_place(record, ordinal) <= high for record in ended),
            }
        )
    return {
        "threshold": threshold,
        "responses": len(records),
        "ended": len(ended),
        "tokens": sum(record.response_ids_length for record in records),
        "tokens_of_ended": sum(record.response_ids_length for record in ended),
        "by_position": rows,
    }


def _places(record: EvaluationRecord, ordinal: bool) -> list[int]:
    tokens = record.prefix_tokens or []
    return list(range(1, len(tokens) + 1)) if ordinal else tokens


def _ending_place(record: EvaluationRecord, ordinal: bool) -> int:
    """Of an ended response: its last one."""
    return _places(record, ordinal)[-1]


def _groups(places: Sequence[Sequence[int]], most: int) -> list[tuple[int, int]]:
    """(first, last) place of each row: every place its own, or at most `most` rows of about as many scores."""
    flat = np.sort(np.array([place for each in places for place in each], dtype=np.int64))
    known = np.unique(flat)
    if len(known) <= most:
        edges = known
    else:
        edges = np.unique([flat[-(-len(flat) * part // most) - 1] for part in range(1, most + 1)])
    starts = [int(known[0])] if len(known) else []
    starts += [int(known[known > edge][0]) for edge in edges[:-1]]
    return list(zip(starts, edges.tolist(), strict=True))


_Read = Callable[[EvaluationRecord], tuple[float, int] | None]


def _last_in(low: int, high: int, ordinal: bool) -> _Read:
    """(score, tokens) of a response's last prefix at places from `low` to `high`; None without one."""

    def read(record: EvaluationRecord) -> tuple[float, int] | None:
        scores, tokens = record.prefix_scores or [], record.prefix_tokens or []
        inside = [index for index, place in enumerate(_places(record, ordinal)) if low <= place <= high]
        return (scores[inside[-1]], tokens[inside[-1]]) if inside else None

    return read


def _of_end(record: EvaluationRecord) -> tuple[float, int] | None:
    return None if record.score is None else (record.score, record.response_ids_length)


def _row(
    problems: Sequence[Sequence[EvaluationRecord]], read: _Read, seed: int, *, with_end: bool = False
) -> dict[str, Any]:
    found = [
        [(record, value) for record in problem if (value := read(record)) is not None] for problem in problems
    ]
    entries = [
        np.array([[score, record.right] for record, (score, _) in problem], dtype=np.float64).reshape(-1, 2)
        for problem in found
    ]

    def statistic(picked: Sequence[FloatArray]) -> float:
        scores, right = np.concatenate(picked).T
        return auroc(scores, right)

    flat = [pair for problem in found for pair in problem]
    low, high = bootstrap_interval(
        entries, seed=seed, num_resamples=_AUROC_RESAMPLES, level=_LEVEL, statistic=statistic
    )
    row = {
        "tokens": _mean([tokens for _, (_, tokens) in flat]),
        "responses": len(flat),
        "right": _mean([float(record.right) for record, _ in flat]),
        "score_right_mean": _mean([score for record, (score, _) in flat if record.right]),
        "score_wrong_mean": _mean([score for record, (score, _) in flat if not record.right]),
        "auroc": statistic(entries) if entries else math.nan,
        "low": low,
        "high": high,
    }
    if with_end:
        scored = [record for record, _ in flat if record.score is not None]
        labels = [float(record.right) for record in scored]
        row["end_auroc"] = auroc([record.score for record in scored], labels)
    return row


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _ends_at(record: EvaluationRecord, threshold: float) -> int | None:
    """After how many tokens the response ends; None: it does not."""
    pairs = zip(record.prefix_tokens or [], record.prefix_scores or [], strict=True)
    return next((tokens for tokens, score in pairs if score < threshold), None)


def _ended(record: EvaluationRecord) -> EvaluationRecord:
    return replace(record, reward=0.0, outcome="ended", score=None, extracted=None, answer_class=None)


def _choices(
    problems: Sequence[Sequence[EvaluationRecord]], ways: Sequence[str], seed: int, subsets: int
) -> dict[str, FloatArray]:
    """Each of `ways` -> [problems] share that is right with all K responses."""
    curves = voting_curves(
        [[record.answer_class for record in problem] for problem in problems],
        [[float(record.right) for record in problem] for problem in problems],
        [[record.score for record in problem] for problem in problems],
        subsets=subsets,
        seed=seed,
    )
    found = {
        "accuracy": curves.average,
        "majority": curves.majority,
        "weighted_majority": curves.weighted_majority,
    }
    return {way: found[way][:, -1] for way in ways}


def _changed(values: FloatArray, before: FloatArray, seed: int, resamples: int) -> dict[str, float]:
    difference: NDArray[np.float64] = values - before
    low, high = bootstrap_interval(difference.tolist(), seed=seed, num_resamples=resamples, level=_LEVEL)
    return {"value": float(values.mean()), "change": float(difference.mean()), "low": low, "high": high}
