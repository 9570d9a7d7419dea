"""The numbers of an evaluation, from its records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_laser.algorithms.metrics import auroc, bootstrap_interval, spearman, verification_metrics
from megatron_laser.algorithms.voting import FloatArray, VotingCurves, voting_curves
from megatron_laser.evaluation.records import EvaluationRecord

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


def summarize(
    records: Sequence[EvaluationRecord], *, seed: int = 0, subsets: int = 200, num_resamples: int = 1000
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
    summary |= _verification(scored, "")
    summary |= _verification(boxed, "boxed_")
    summary |= _score_statistics(scored)
    summary |= _zc_statistics(records)
    summary |= _response_statistics(records)
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
    clamp(r_s, 0, 1)) and best_of (by raw score) where there are scores, too; logprob_majority (weights e^(mean token
    log-prob), as in DeepConf, arXiv 2508.15260, with the log-prob of the sampled tokens in place of the top-k
    confidence) and best_by_logprob, what a user would try without a trained score. All votes are over the same random
    subsets. The best is the best of those with an answer, or of all where answers cannot be compared.
    """
    everything = [record for problem in problems for record in problem]
    has_scores = any(record.score is not None for record in everything)
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
        if (has_scores or name not in _NEED_SCORES) and (can_vote or name not in _NEED_ANSWERS)
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
        "accuracy": float(np.mean([record.right for problem in problems for record in problem])),
        "accuracy_low": low,
        "accuracy_high": high,
    }
    for name, curve in curves.items():
        values = curve.mean(axis=0)
        summary[name] = float(values[-1])
        summary |= {f"{name}_at_{k}": float(value) for k, value in enumerate(values, start=1)}
    for name, first, second in (
        ("weighted_minus_majority", "weighted_majority", "majority"),
        ("best_minus_average", "best_of", "average"),
    ):
        if first in curves and second in curves:
            summary |= _difference(name, curves[first] - curves[second], seed, resamples)
    return summary


def _difference(name: str, curves: FloatArray, seed: int, resamples: int) -> dict[str, float]:
    """Of [problems, K] with k = K: the mean and its interval over problems."""
    last = curves[:, -1]
    low, high = bootstrap_interval(last.tolist(), seed=seed, num_resamples=resamples)
    return {name: float(last.mean()), f"{name}_low": low, f"{name}_high": high}


def _verification(records: list[EvaluationRecord], prefix: str) -> dict[str, float]:
    """Scores, and what needs no score, judged by how well they tell right from wrong."""
    scores = [record.score for record in records]
    labels = [float(record.right) for record in records]
    metrics = verification_metrics(scores, labels)._asdict()
    return {f"{prefix}self_reward_{name}": value for name, value in metrics.items()} | {
        f"{prefix}length_auroc": auroc([record.response_ids_length for record in records], labels),
        f"{prefix}mean_logprob_auroc": auroc([record.mean_logprob for record in records], labels),
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
