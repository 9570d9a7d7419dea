"""The score as a verifier, with bootstrap intervals over problems, in the project's convention and the released one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_laser.algorithms.metrics import FloatArray, verification_metrics
from megatron_laser.evaluation.records import EvaluationRecord
from megatron_laser.evaluation.released_convention import released_scores

_LEVEL = 0.95
_RESAMPLES = 400  # each one sorts all scores; enough for two digits of an interval
_INTERVALS_OF = ("accuracy_correct", "accuracy_incorrect", "f1", "accuracy", "auroc", "ece", "brier")


def verification_intervals(
    problems: Sequence[Sequence[EvaluationRecord]], picks: NDArray[np.int64], threshold: float
) -> dict[str, dict[str, float]]:
    """Each metric of records that all have a score; resamples in which it is undefined are left out.

    Args:
        picks: [resamples, problems], numbers of resampled problems; the first 400 are used.

    Returns:
        metric -> {"value", "low", "high"}.
    """
    scores = [np.array([record.score for record in problem], dtype=np.float64) for problem in problems]
    labels = [np.array([record.right for record in problem], dtype=np.float64) for problem in problems]

    def metrics(order: Sequence[int] | NDArray[np.int64]) -> tuple[float, ...]:
        joined = verification_metrics(
            np.concatenate([scores[i] for i in order]),
            np.concatenate([labels[i] for i in order]),
            threshold=threshold,
        )._asdict()
        return tuple(joined[name] for name in _INTERVALS_OF)

    values = metrics(range(len(problems)))
    resampled = np.array([metrics(row) for row in picks[:_RESAMPLES]])
    return {
        name: {"value": value, **_quantiles(resampled[:, column])}
        for column, (name, value) in enumerate(zip(_INTERVALS_OF, values))
    }


def released_intervals(
    problems: Sequence[Sequence[EvaluationRecord]],
    picks: NDArray[np.int64],
    threshold: float,
    missing_is_zero: bool,
) -> dict[str, dict[str, float]] | None:
    """The same of all responses, see `released_convention`; None where a score is unknown or nobody has one."""
    scores = [released_scores(problem, missing_is_zero=missing_is_zero) for problem in problems]
    given = any(record.score is not None for problem in problems for record in problem)
    if not given or any(score is None for problem in scores for score in problem):
        return None
    scored = [
        [replace(record, score=score) for record, score in zip(problem, row, strict=True)]
        for problem, row in zip(problems, scores, strict=True)
    ]
    return verification_intervals(scored, picks, threshold)


def _quantiles(values: FloatArray) -> dict[str, float]:
    values = values[~np.isnan(values)]
    if values.size == 0:
        return {"low": math.nan, "high": math.nan}
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return {"low": float(low), "high": float(high)}
