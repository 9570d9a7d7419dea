"""The numbers of an evaluation, from its records: the flat summary, and the curves and intervals of results.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_laser.algorithms.metrics import auroc, bootstrap_interval, spearman, verification_metrics
from megatron_laser.algorithms.voting import FloatArray, VotingCurves, voting_curves
from megatron_laser.evaluation.records import EvaluationRecord
from megatron_laser.evaluation.released_convention import released_summary
from megatron_laser.evaluation.verification_intervals import released_intervals, verification_intervals

_CURVES = {
    "average": "average",
    "pass": "pass_rate",
    "majority": "majority",
    "weighted_majority": "weighted_majority",
    "best_of": "best",
}
_NEED_SCORES = ("weighted_majority", "best_of")
_NEED_ANSWERS = ("majority", "weighted_majority", "logprob_majority")
# What needs no trained score: the same votes with the mean token log-prob in the score's place.
_LOGPROB_CURVES = {"logprob_majority": "weighted_majority", "best_by_logprob": "best"}
LENGTH_BINS = 5
RELIABILITY_BINS = 10
_LEVEL = 0.95
# first minus second, over the same subsets of responses
_DIFFERENCES = {
    "weighted_minus_majority": ("weighted_majority", "majority"),
    "weighted_minus_logprob_majority": ("weighted_majority", "logprob_majority"),
    "best_minus_average": ("best_of", "average"),
}
_SUMMARY_DIFFERENCES = ("weighted_minus_majority", "best_minus_average")


def summarize(
    records: Sequence[EvaluationRecord],
    *,
    seed: int = 0,
    subsets: int = 200,
    num_resamples: int = 1000,
    threshold: float = 0.5,
    missing_is_zero: bool = False,
) -> dict[str, float]:
    """Everything that is reported about an evaluation, as flat names.

    With K the smallest number of responses to a problem:
    - `accuracy` (average over responses) with its 95 % interval `accuracy_low`, `accuracy_high`;
    - `<way>_at_<k>` for k = 1..K and `<way>` for k = K, the ways being those of `vote_curves`;
      `weighted_minus_majority` with `_low` and `_high`;
    - `best_minus_average`, with `_low` and `_high`;
    - `self_reward_<metric>`: `verification_metrics` over the responses that have a score and a grade (their number
      is `num_scored`), `boxed_self_reward_<metric>` over those that also have a boxed answer
      (`num_scored_boxed`). A response without a score has no part in them, and weight 0 in votes;
    - `released_self_reward_<metric>`: the same metrics as the released evaluator counts them, see
      `released_convention`; NaN where a response with a box that was cut off has not been scored;
    - `length_auroc` and `mean_logprob_auroc` over the same responses, for comparison with
      `self_reward_auroc`. They are raw: the chance that a right response is the longer (the more probable)
      one, so a length AUROC below 0.5 says that shorter responses are right more often;
    - `score_length_spearman`, scores of right and wrong responses, log-probs of the score token, lengths,
      truncation, and `outcome/<name>` counts.

    Weighted votes and best-of are left out where no response has a score, votes where answers cannot be compared
    (`no_votes`); what is undefined is NaN.

    Args:
        seed: of random subsets and of the bootstrap, which resamples problems.
        subsets: random orders of each problem's responses for the vote curves.
        num_resamples: of the bootstrap.
        threshold: a response is called right when its score exceeds it.
        missing_is_zero: see `released_convention.released_scores`.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("there are no evaluation records to summarize; expected at least one")
    problems = by_problem(records)
    scored = [record for record in records if record.verifiable]
    boxed = [record for record in scored if record.extracted is not None]
    summary: dict[str, float] = {
        "num_problems": len(problems),
        "num_responses": len(records),
        "num_scored": len(scored),
        "num_scored_boxed": len(boxed),
    }
    summary |= _voting(problems, seed=seed, subsets=subsets, resamples=num_resamples)
    summary |= _verification(scored, "", threshold)
    summary |= _verification(boxed, "boxed_", threshold)
    summary |= released_summary(records, threshold=threshold, missing_is_zero=missing_is_zero)
    summary |= _score_statistics(scored)
    summary |= _zc_statistics(records)
    summary |= _response_statistics(records)
    return summary


def summarize_sources(records: Sequence[EvaluationRecord], *, seed: int = 0) -> dict[str, float]:
    """`summarize` over all records, and where they are of several sources over each one's, under source/<name>/."""
    summary = summarize(records, seed=seed)
    for name in sorted({record.source for record in records} - {""}):
        mine = summarize([record for record in records if record.source == name], seed=seed)
        summary |= {f"source/{name}/{metric}": value for metric, value in mine.items()}
    return summary


def by_problem(records: Sequence[EvaluationRecord]) -> list[list[EvaluationRecord]]:
    """The records of each problem, both in the order of their numbers."""
    problems: dict[int, list[EvaluationRecord]] = {}
    for record in sorted(records, key=lambda record: (record.row, record.sample)):
        problems.setdefault(record.row, []).append(record)
    return list(problems.values())


def no_votes(records: Iterable[EvaluationRecord]) -> str:
    """Why there can be no votes: answers are the contents of boxes, and what the verifier judges is not in them.

    A response without an answer abstains. Where right responses do, a vote would be counted wrong for what it
    cannot see.

    Returns:
        The reason, in words; "" where votes mean what they say.
    """
    records = list(records)
    if all(record.answer_class is None for record in records):
        return "no response has an answer to compare (the content of its last \\boxed{})"
    right = [record for record in records if record.right]
    without = sum(record.answer_class is None for record in right)
    if without:
        return (
            f"{without} of the {len(right)} right responses have no answer to compare (the content of the last "
            "\\boxed{})"
        )
    return ""


def vote_curves(problems: list[list[EvaluationRecord]], *, seed: int, subsets: int) -> dict[str, FloatArray]:
    """Way of choosing -> accuracy with k = 1..K responses, each [problems, K]. See `algorithms.voting`.

    average and pass (pass@k) always; majority where answers can be compared (`no_votes`); weighted_majority (weights
    clamp(r_s, 0, 1)) and best_of (by raw score) where there are scores, too; where there are log-probs logprob_majority
    (weights e^(mean token log-prob), as in DeepConf, arXiv 2508.15260, with the log-prob of the sampled tokens in place
    of the top-k confidence) and best_by_logprob, what a user would try without a trained score. All votes are over the
    same random subsets. The best is the best of those with an answer, or of all where answers cannot be compared.
    """
    everything = [record for problem in problems for record in problem]
    has_scores = any(record.score is not None for record in everything)
    has_logprobs = any(record.mean_logprob is not None for record in everything)
    can_vote = not no_votes(everything)

    def curves_of(weights: list[list[float | None]]) -> VotingCurves:
        return voting_curves(
            [[record.answer_class if can_vote else 0 for record in problem] for problem in problems],
            [[float(record.right) for record in problem] for problem in problems],
            weights,
            subsets=subsets,
            seed=seed,
        )

    by_score = curves_of([[record.score for record in problem] for problem in problems])
    by_logprob = curves_of(
        [
            [None if record.mean_logprob is None else math.exp(record.mean_logprob) for record in problem]
            for problem in problems
        ]
    )
    curves = {name: getattr(by_score, field) for name, field in _CURVES.items()}
    curves |= {name: getattr(by_logprob, field) for name, field in _LOGPROB_CURVES.items()}
    return {
        name: curve
        for name, curve in curves.items()
        if (has_scores or name not in _NEED_SCORES)
        and (has_logprobs or name not in _LOGPROB_CURVES)
        and (can_vote or name not in _NEED_ANSWERS)
    }


def _voting(
    problems: list[list[EvaluationRecord]], *, seed: int, subsets: int, resamples: int
) -> dict[str, float]:
    curves = vote_curves(problems, seed=seed, subsets=subsets)
    max_k = curves["average"].shape[1]
    per_problem = [float(np.mean([record.right for record in problem])) for problem in problems]
    low, high = bootstrap_interval(per_problem, seed=seed, num_resamples=resamples)
    summary = {
        "samples_per_prompt": float(max_k),
        "accuracy": _accuracy(problems, per_problem),
        "accuracy_low": low,
        "accuracy_high": high,
    }
    for name, curve in curves.items():
        values = curve.mean(axis=0)
        summary[name] = float(values[-1])
        summary |= {f"{name}_at_{k}": float(value) for k, value in enumerate(values, start=1)}
    for name in _SUMMARY_DIFFERENCES:
        first, second = _DIFFERENCES[name]
        if first in curves and second in curves:
            summary |= _difference(name, curves[first] - curves[second], seed, resamples)
    return summary


def _accuracy(problems: list[list[EvaluationRecord]], per_problem: list[float]) -> float:
    """Every problem counts alike, also where sources have different numbers of responses to each."""
    if len({len(problem) for problem in problems}) > 1:
        return float(np.mean(per_problem))
    return float(np.mean([record.right for problem in problems for record in problem]))


def _difference(name: str, curves: FloatArray, seed: int, resamples: int) -> dict[str, float]:
    """Of [problems, K] with k = K: the mean and its interval over problems."""
    last = curves[:, -1]
    low, high = bootstrap_interval(last.tolist(), seed=seed, num_resamples=resamples)
    return {name: float(last.mean()), f"{name}_low": low, f"{name}_high": high}


def _verification(records: list[EvaluationRecord], prefix: str, threshold: float) -> dict[str, float]:
    """Scores, and what needs no score, judged by how well they tell right from wrong."""
    scores = [record.score for record in records]
    labels = [float(record.right) for record in records]
    metrics = verification_metrics(scores, labels, threshold=threshold)._asdict()
    return {f"{prefix}self_reward_{name}": value for name, value in metrics.items()} | {
        f"{prefix}length_auroc": auroc([record.response_ids_length for record in records], labels),
        f"{prefix}mean_logprob_auroc": math.nan
        if any(record.mean_logprob is None for record in records)
        else auroc([record.mean_logprob for record in records], labels),
    }


def _score_statistics(scored: list[EvaluationRecord]) -> dict[str, float]:
    summary = {
        "score_length_spearman": spearman(
            [record.score for record in scored], [record.response_ids_length for record in scored]
        )
    }
    for name, right in (("right", True), ("wrong", False)):
        scores = [r.score for r in scored if r.right is right and r.score is not None]
        summary[f"score_{name}_mean"] = float(np.mean(scores)) if scores else math.nan
        summary[f"score_{name}_std"] = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
    return summary


def _zc_statistics(records: Sequence[EvaluationRecord]) -> dict[str, float]:
    """Mean, standard deviation and maximum; on the initial model, c_ref and how constant it is."""
    values = [record.zc_logprob for record in records if record.zc_logprob is not None]
    if not values:
        return {}
    return {
        "zc_logprob_mean": float(np.mean(values)),
        "zc_logprob_std": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        "zc_logprob_max": max(values),
    }


def _response_statistics(records: Sequence[EvaluationRecord]) -> dict[str, float]:
    count = len(records)
    outcomes = Counter(record.outcome for record in records)
    return {
        "response_length_mean": sum(record.response_ids_length for record in records) / count,
        "truncated_fraction": sum(record.finish_reason == "length" for record in records) / count,
        "scored_fraction": sum(record.scored for record in records) / count,
        "boxed_fraction": sum(record.extracted is not None for record in records) / count,
    } | {f"outcome/{name}": float(number) for name, number in sorted(outcomes.items())}


def evaluation_detail(
    records: Sequence[EvaluationRecord],
    *,
    seed: int = 0,
    subsets: int = 200,
    num_resamples: int = 1000,
    threshold: float = 0.5,
    missing_is_zero: bool = False,
) -> dict[str, Any]:
    """All numbers of an evaluation, as results.json holds them; the arguments are those of `summarize`.

    Returns:
        summary: see `summarize`.
        no_votes: why votes are not available, None where they are.
        curves: way -> {"mean", "low", "high"}, lists over k = 1..K; see `vote_curves`. The intervals are 95 %
            bootstraps over problems, with the same resampled problems for every way and every k.
        differences: the same for pairs of ways, whose intervals say whether one is better.
        verification: "all" responses with a score, the "boxed" ones among them, and where it is known "released", all
            responses as the released evaluator counts them: metric -> {"value", "low", "high"}.
        by_length: see `accuracy_by_length`.
        reliability: see `reliability_bins`.

    Raises:
        ValueError: no records.
    """
    summary = summarize(
        records,
        seed=seed,
        subsets=subsets,
        num_resamples=num_resamples,
        threshold=threshold,
        missing_is_zero=missing_is_zero,
    )
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
    released = released_intervals(problems, picks, threshold, missing_is_zero)
    return {
        "summary": summary,
        "no_votes": no_votes(records) or None,
        "curves": {name: _with_interval(values, picks) for name, values in curves.items()},
        "differences": {name: _with_interval(values, picks) for name, values in differences.items()},
        "verification": {
            "all": verification_intervals(scored, picks, threshold),
            "boxed": verification_intervals(boxed, picks, threshold),
            **({} if released is None else {"released": released}),
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
