"""What a report shows beside the flat summary: whole curves with intervals, and accuracy by length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_laser.algorithms.metrics import auroc, verification_metrics
from megatron_laser.evaluation.records import EvaluationRecord
from megatron_laser.evaluation.summary import by_problem, no_votes, summarize, vote_curves

FloatArray = NDArray[np.float64]

LENGTH_BINS = 5
RELIABILITY_BINS = 10
_LEVEL = 0.95
_METRIC_RESAMPLES = 400  # each one sorts all scores; enough for two digits of an interval
# first minus second, over the same subsets of responses
_DIFFERENCES = {
    "weighted_minus_majority": ("weighted_majority", "majority"),
    "weighted_minus_logprob_majority": ("weighted_majority", "logprob_majority"),
    "best_minus_average": ("best_of", "average"),
}
_INTERVALS_OF = ("accuracy_correct", "accuracy_incorrect", "f1", "accuracy", "auroc", "ece", "brier")


def evaluation_detail(
    records: Sequence[EvaluationRecord], *, seed: int = 0, subsets: int = 200, num_resamples: int = 1000
) -> dict[str, Any]:
    """All numbers of an evaluation, as results.json holds them.

    Returns:
        summary: see `summarize`.
        no_votes: why votes are not available, None where they are.
        curves: way -> {"mean", "low", "high"}, lists over k = 1..K; see `vote_curves`. The intervals are 95 %
            bootstraps over problems, with the same resampled problems for every way and every k.
        differences: the same for pairs of ways, whose intervals say whether one is better.
        verification: "all" responses with a score, and the "boxed" ones among them: metric ->
            {"value", "low", "high"}.
        by_length: see `accuracy_by_length`.
        reliability: see `reliability_bins`.

    Raises:
        ValueError: no records.
    """
    summary = summarize(records, seed=seed, subsets=subsets, num_resamples=num_resamples)
    problems = by_problem(records)
    curves = vote_curves(problems, seed=seed, subsets=subsets)
    picks = np.random.default_rng(seed).integers(len(problems), size=(num_resamples, len(problems)))
    differences = {
        name: curves[first] - curves[second]
        for name, (first, second) in _DIFFERENCES.items()
        if first in curves and second in curves
    }
    scored = [[record for record in problem if record.verifiable] for problem in problems]
    boxed = [[record for record in problem if record.extracted is not None] for problem in scored]
    return {
        "summary": summary,
        "no_votes": no_votes(records) or None,
        "curves": {name: _with_interval(values, picks) for name, values in curves.items()},
        "differences": {name: _with_interval(values, picks) for name, values in differences.items()},
        "verification": {
            "all": _verification(scored, picks[:_METRIC_RESAMPLES]),
            "boxed": _verification(boxed, picks[:_METRIC_RESAMPLES]),
        },
        "by_length": accuracy_by_length(records),
        "reliability": reliability_bins(records),
    }


def accuracy_by_length(records: Sequence[EvaluationRecord], bins: int = LENGTH_BINS) -> list[dict[str, Any]]:
    """Responses in `bins` groups of about equal size, from short to long; equal lengths stay together.

    Returns:
        For each group: `shortest` and `longest` response in tokens, `responses`, `accuracy`, `truncated` (a
        share), `score_mean` and `auroc` of those that have a score (NaN where undefined).
    """
    lengths = np.sort([record.response_ids_length for record in records])
    edges = np.unique([lengths[-(-len(lengths) * place // bins) - 1] for place in range(1, bins + 1)])
    groups: list[dict[str, Any]] = []
    for index, edge in enumerate(edges):
        above = edges[index - 1] if index else -1
        chosen = [record for record in records if above < record.response_ids_length <= edge]
        scored = [record for record in chosen if record.verifiable]
        scores = [r.score for r in scored if r.score is not None]
        labels = [float(r.right) for r in scored]
        groups.append(
            {
                "shortest": min(record.response_ids_length for record in chosen),
                "longest": int(edge),
                "responses": len(chosen),
                "accuracy": float(np.mean([record.right for record in chosen])),
                "truncated": float(np.mean([record.finish_reason == "length" for record in chosen])),
                "score_mean": float(np.mean(scores)) if scores else math.nan,
                "auroc": auroc(scores, labels),
            }
        )
    return groups


def reliability_bins(
    records: Sequence[EvaluationRecord], bins: int = RELIABILITY_BINS
) -> list[dict[str, Any]]:
    """Scored responses by clamp(score, 0, 1) in equal bins (the last one closed): mean score, share right."""
    scored = [record for record in records if record.verifiable]
    scores = np.array([record.score for record in scored], dtype=np.float64).clip(0, 1)
    right = np.array([record.right for record in scored], dtype=np.float64)
    index = np.minimum((scores * bins).astype(int), bins - 1)
    return [
        {
            "low": place / bins,
            "high": (place + 1) / bins,
            "responses": int((index == place).sum()),
            "score_mean": float(scores[index == place].mean()),
            "right": float(right[index == place].mean()),
        }
        for place in range(bins)
        if (index == place).any()
    ]


def _with_interval(values: FloatArray, picks: NDArray[np.int64]) -> dict[str, list[float]]:
    """[problems, K] and resampled problems [resamples, problems] to mean and interval, [K] each."""
    means = np.stack([values[row].mean(axis=0) for row in picks])
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
    return {"mean": values.mean(axis=0).tolist(), "low": low.tolist(), "high": high.tolist()}


def _verification(
    problems: list[list[EvaluationRecord]], picks: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """Each metric with its interval; resamples in which it is undefined are left out."""
    scores = [np.array([record.score for record in problem], dtype=np.float64) for problem in problems]
    labels = [np.array([record.right for record in problem], dtype=np.float64) for problem in problems]

    def metrics(order: Sequence[int] | NDArray[np.int64]) -> tuple[float, ...]:
        joined = verification_metrics(
            np.concatenate([scores[i] for i in order]), np.concatenate([labels[i] for i in order])
        )._asdict()
        return tuple(joined[name] for name in _INTERVALS_OF)

    values = metrics(range(len(problems)))
    resampled = np.array([metrics(row) for row in picks])
    return {
        name: {"value": value, **_quantiles(resampled[:, column])}
        for column, (name, value) in enumerate(zip(_INTERVALS_OF, values))
    }


def _quantiles(values: FloatArray) -> dict[str, float]:
    values = values[~np.isnan(values)]
    if values.size == 0:
        return {"low": math.nan, "high": math.nan}
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return {"low": float(low), "high": float(high)}
