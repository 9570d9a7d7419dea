"""How well scores tell right responses from wrong ones.

Every function takes tensors, arrays or sequences and returns Python floats, computed in float64. What is
undefined, such as AUROC with one class, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Item = TypeVar("Item")
Values = Any  # a tensor, an array or a sequence of numbers, one-dimensional
FloatArray = NDArray[np.float64]

_ECE_BINS = 10


class VerificationMetrics(NamedTuple):
    """See `verification_metrics`."""

    accuracy_correct: float
    accuracy_incorrect: float
    f1: float
    accuracy: float
    auroc: float
    ece: float
    brier: float


def verification_metrics(scores: Values, labels: Values, *, threshold: float = 0.5) -> VerificationMetrics:
    """Judge scores against the verifier's labels; a response is called right when its score > threshold.

    `accuracy_correct` and `accuracy_incorrect` are the shares of right and of wrong responses that are called
    so, NaN where there are none; `f1` is the harmonic mean of these two (not the F1 of precision and recall),
    as in the LaSeR paper. `ece` (10 equal bins) and `brier` are of clamp(score, 0, 1) as a probability.

    Args:
        scores: [n], raw scores r_s. Give a response without a score 0, or leave it out of both arguments.
        labels: [n], 1 right or 0 wrong (or bool).
        threshold: of the decision.

    Raises:
        ValueError: a NaN score, or a label that is neither 0 nor 1.
    """
    values, right = _scores_and_labels(scores, labels)
    if values.size == 0:
        return VerificationMetrics(*[math.nan] * len(VerificationMetrics._fields))
    called_right = values > threshold
    accuracy_correct = _mean(called_right[right])
    accuracy_incorrect = _mean(~called_right[~right])
    both = accuracy_correct + accuracy_incorrect
    probabilities = values.clip(0.0, 1.0)
    return VerificationMetrics(
        accuracy_correct=accuracy_correct,
        accuracy_incorrect=accuracy_incorrect,
        f1=0.0 if both == 0 else 2 * accuracy_correct * accuracy_incorrect / both,
        accuracy=_mean(called_right == right),
        auroc=auroc(values, right),
        ece=_expected_calibration_error(probabilities, right),
        brier=_mean((probabilities - right) ** 2),
    )


def auroc(values: Values, labels: Values) -> float:
    """The chance that a right response has a higher value than a wrong one, ties counting half; NaN with one
    class."""
    array, right = _scores_and_labels(values, labels)
    num_right = int(right.sum())
    num_wrong = right.size - num_right
    if num_right == 0 or num_wrong == 0:
        return math.nan
    rank_sum = float(_average_ranks(array)[right].sum())
    return (rank_sum - num_right * (num_right + 1) / 2) / (num_right * num_wrong)


def spearman(scores: Values, lengths: Values) -> float:
    """Spearman's rank correlation, ties by average ranks; NaN below two values or where one is constant."""
    first, second = _array(scores), _array(lengths)
    if first.shape != second.shape:
        raise ValueError(
            f"scores has {first.size} values and lengths {second.size}; expected the same number"
        )
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("scores or lengths contain NaN; leave those responses out of both")
    if first.size < 2:
        return math.nan
    x = _average_ranks(first) - (first.size + 1) / 2
    y = _average_ranks(second) - (second.size + 1) / 2
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm > 0 else math.nan


def bootstrap_interval(
    values: Sequence[Item],
    *,
    seed: int,
    num_resamples: int = 1000,
    level: float = 0.95,
    statistic: Callable[[list[Item]], float] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic, resampling whole problems.

    Responses to one problem are not independent, so an entry must hold everything of one problem.

    Args:
        values: one entry for each problem: a number, or what `statistic` takes a list of.
        seed: of the resampling; the same seed gives the same interval.
        level: coverage, between 0 and 1.
        statistic: from a resampled list of entries to a number; default the mean. Resamples where it is NaN
            (one class only) are left out.

    Returns:
        (low, high); NaN without problems, or where the statistic is never defined.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number between 0 and 1")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; expected 1 or more")
    if len(values) == 0:
        return math.nan, math.nan
    picks = np.random.default_rng(seed).integers(len(values), size=(num_resamples, len(values)))
    if statistic is None:
        results = _array(values)[picks].mean(axis=1)
    else:
        results = np.array([statistic([values[index] for index in row]) for row in picks])
    results = results[~np.isnan(results)]
    if results.size == 0:
        return math.nan, math.nan
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _expected_calibration_error(probabilities: FloatArray, right: NDArray[np.bool_]) -> float:
    """Sum over bins of the bin's share times |share right - mean probability|; bin b is [b/10, (b+1)/10)."""
    bins = np.minimum((probabilities * _ECE_BINS).astype(np.int64), _ECE_BINS - 1)
    gaps = np.bincount(bins, weights=right - probabilities, minlength=_ECE_BINS)
    return float(np.abs(gaps).sum() / probabilities.size)


def _average_ranks(values: FloatArray) -> FloatArray:
    """Ranks from 1; equal values share the average of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if values.size else math.nan


def _scores_and_labels(scores: Values, labels: Values) -> tuple[FloatArray, NDArray[np.bool_]]:
    values, targets = _array(scores), _array(labels)
    if values.shape != targets.shape:
        raise ValueError(
            f"there are {values.size} scores and {targets.size} labels; expected the same number"
        )
    if np.isnan(values).any():
        raise ValueError(
            f"scores[{int(np.isnan(values).argmax())}] is NaN; give a response without a score 0, "
            "or leave it out of scores and labels"
        )
    if not np.isin(targets, (0.0, 1.0)).all():
        bad = int((~np.isin(targets, (0.0, 1.0))).argmax())
        raise ValueError(f"labels[{bad}] is {targets[bad]}; expected 1 (right) or 0 (wrong)")
    return values, targets > 0.5


def _array(values: Values) -> FloatArray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"values have shape {array.shape}; expected one dimension")
    return array
