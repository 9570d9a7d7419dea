"""Choosing one of several responses, and how the choice gets better with more of them.

An answer is any hashable key of its equivalence class; None abstains. Votes are compared in sums that do not
depend on the order of the responses, so a tie is a tie whichever response came first. One rule breaks all ties: the
first seen wins. Responses are sampled alike, so their order is chance, and `voting_curves` averages over it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Answers = Sequence[Hashable | None]
FloatArray = NDArray[np.float64]


def majority_vote(answers: Answers, *, weights: Sequence[float] | None = None) -> int | None:
    """The index of the winning answer's first response, or None when every response abstains.

    Args:
        answers: [k], one for each response.
        weights: [k], finite and >= 0; for the weighted vote of LaSeR clamp(r_s, 0, 1), 0 without a score.

    The largest count wins, ties by first seen; with weights the largest sum of weights wins, ties by count,
    then by first seen.
    """
    if weights is not None:
        _check_lengths(answers=answers, weights=weights)
        _check_weights(weights)
    members: dict[Hashable, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            members.setdefault(answer, []).append(index)
    if not members:
        return None

    def rank(indices: list[int]) -> tuple[float, int, int]:
        total = math.fsum(weights[index] for index in indices) if weights is not None else 0.0
        return total, len(indices), -indices[0]

    return max(members.values(), key=rank)[0]


def best_of(answers: Answers, scores: Sequence[float | None]) -> int | None:
    """The index of the answered response with the highest raw score, ties by first seen.

    A response without a score (None or NaN) ranks below every score. None when every response abstains.
    """
    _check_lengths(answers=answers, scores=scores)
    answered = [index for index, answer in enumerate(answers) if answer is not None]
    return max(answered, key=lambda index: (_rank_score(scores[index]), -index), default=None)


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n responses, c of them right, contain a right one.

    Unbiased for pass@k over fresh responses (Chen et al. 2021, arXiv 2107.03374).
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@k with n={n}, c={c}, k={k}; expected 1 <= k <= n and 0 <= c <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


class VotingCurves(NamedTuple):
    """Accuracy with k responses for k = 1..K, each [problems, K]; average over axis 0 for the curve.

    `average`, `pass_rate` and `best` are exact expectations over all subsets of size k and all orders of their
    responses; the two votes are averages over random ones. `best` picks by score, `pass_rate` is pass@k.
    """

    average: FloatArray
    pass_rate: FloatArray
    majority: FloatArray
    weighted_majority: FloatArray
    best: FloatArray


def voting_curves(
    answers: Sequence[Answers],
    correct: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float | None]],
    *,
    max_k: int | None = None,
    subsets: int = 100,
    seed: int = 0,
) -> VotingCurves:
    """How often each way of choosing is right with k = 1..max_k responses to a problem.

    Args:
        answers: for each problem, one answer class for each response; None abstains.
        correct: for each problem, 1 or 0 for each response. A choice is right when the response it points
            to is; no choice is wrong.
        scores: for each problem, the raw score of each response, None or NaN without one. The weighted vote
            uses clamp(score, 0, 1), and 0 without a score.
        max_k: K; default the smallest number of responses to a problem.
        subsets: random orders of each problem's responses; the subset of size k is an order's first k.
        seed: of the random orders. Each problem has its own stream, so adding problems changes no other.
    """
    _check_lengths(answers=answers, correct=correct, scores=scores)
    if not answers:
        raise ValueError("voting_curves got no problem; expected at least one")
    if subsets < 1:
        raise ValueError(f"subsets is {subsets}; expected 1 or more")
    fewest = min(len(row) for row in answers)
    max_k = fewest if max_k is None else max_k
    if not 1 <= max_k <= fewest:
        raise ValueError(
            f"max_k is {max_k} but the problem with the fewest responses has {fewest}; "
            "expected 1 to that number: sample more responses or lower max_k"
        )
    curves = VotingCurves(*(np.empty((len(answers), max_k)) for _ in VotingCurves._fields))
    for row, (problem_answers, problem_correct, problem_scores) in enumerate(zip(answers, correct, scores)):
        _check_lengths(answers=problem_answers, correct=problem_correct, scores=problem_scores)
        right = np.asarray(problem_correct, dtype=np.float64)
        rank_scores = np.array([_rank_score(score) for score in problem_scores])
        classes = _class_indices(problem_answers)
        orders = np.random.default_rng([seed, row]).permuted(
            np.tile(np.arange(right.size), (subsets, 1)), axis=1
        )[:, :max_k]
        ks = range(1, max_k + 1)
        curves.average[row] = right.mean()
        curves.pass_rate[row] = [pass_at_k(right.size, int((right > 0).sum()), k) for k in ks]
        curves.best[row] = _expected_best(classes, right, rank_scores, max_k)
        ones = np.ones(right.size)
        curves.majority[row] = _vote_accuracy(orders, classes, right, ones)
        # -inf, a response without a score, clamps to weight 0.
        curves.weighted_majority[row] = _vote_accuracy(orders, classes, right, rank_scores.clip(0.0, 1.0))
    return curves


def _vote_accuracy(
    orders: NDArray[np.int64], classes: NDArray[np.int64], right: FloatArray, weights: FloatArray
) -> FloatArray:
    """`majority_vote` on the first k of every order, for every k: [subsets, K] orders -> [K] accuracy."""
    num_classes = int(classes.max()) + 1
    if num_classes == 0:
        return np.zeros(orders.shape[1])
    members = classes[orders][:, :, None] == np.arange(num_classes)  # [subsets, K, classes]
    counts = members.cumsum(axis=1)
    # A coarse part whose sums are exact in float64, and an exact remainder: adding the two sums rounds once,
    # as math.fsum does, so the order of the responses does not decide between equal totals.
    coarse = np.rint(weights * 2.0**40) / 2.0**40
    fine = weights - coarse
    totals = (members * coarse[orders][:, :, None]).cumsum(axis=1) + (
        members * fine[orders][:, :, None]
    ).cumsum(axis=1)
    totals = np.where(counts > 0, totals, -1.0)
    first_seen = members.argmax(axis=1)  # [subsets, classes]
    size = orders.shape[1] + 1
    tie_break = counts * size + (size - 1 - first_seen)[:, None, :]
    winners = np.where(totals == totals.max(axis=2, keepdims=True), tie_break, -1).argmax(axis=2)
    decided = counts.max(axis=2) > 0
    chosen = np.take_along_axis(orders, np.take_along_axis(first_seen, winners, axis=1), axis=1)
    return (right[chosen] * decided).mean(axis=0)


def _expected_best(
    classes: NDArray[np.int64], right: FloatArray, rank_scores: FloatArray, max_k: int
) -> FloatArray:
    """`best_of` averaged over all subsets of each size and all orders of their responses, exactly: [K].

    With responses sorted from best to worst, the one at place i is the best of C(n - 1 - i, k - 1) of the
    C(n, k) subsets. Of those with equal scores each is as often the first seen as any other, so that each counts
    with their mean.
    """
    n = right.size
    abstains = classes < 0
    order = np.lexsort((-rank_scores, abstains))
    ordered_scores, ordered_abstains = rank_scores[order], abstains[order]
    differs = (ordered_scores[1:] != ordered_scores[:-1]) | (ordered_abstains[1:] != ordered_abstains[:-1])
    tied = np.concatenate([[0], differs.cumsum()])  # [n]: number of the group of equal ones
    sums = np.bincount(tied, weights=np.where(abstains, 0.0, right)[order])
    sorted_right = (sums / np.bincount(tied))[tied]
    chances = np.array(
        [[math.comb(n - 1 - i, k - 1) / math.comb(n, k) for i in range(n)] for k in range(1, max_k + 1)]
    )
    return chances @ sorted_right


def _class_indices(answers: Answers) -> NDArray[np.int64]:
    """[n]: classes numbered by first seen, -1 for None."""
    numbers: dict[Hashable, int] = {}
    return np.array(
        [-1 if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers],
        dtype=np.int64,
    )


def _rank_score(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else float(score)


def _check_weights(weights: Sequence[float]) -> None:
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"weights[{index}] is {weight}; expected a finite number, 0 or more: clamp scores to [0, 1] "
                "and give a response without a score 0"
            )


def _check_lengths(**sequences: Sequence[object]) -> None:
    lengths = {name: len(sequence) for name, sequence in sequences.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"lengths differ: {lengths}; expected one entry for each response in all of them")
