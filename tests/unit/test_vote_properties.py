"""Votes and metrics against plain references, on whatever hypothesis thinks of."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score

from megatron_laser.algorithms.metrics import auroc, verification_metrics
from megatron_laser.algorithms.voting import best_of, majority_vote, pass_at_k, voting_curves
from megatron_laser.rewards import equivalence_classes

ballots = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", "c"]), st.floats(0, 1, allow_nan=False)),
    min_size=1,
    max_size=12,
)
scored = st.lists(st.tuples(st.floats(-3, 3, allow_nan=False), st.booleans()), min_size=1, max_size=40)
fast = settings(max_examples=200, deadline=None, derandomize=True)


@given(ballots)
@fast
def test_the_weighted_vote_is_the_exact_sum_then_the_count_then_the_first_seen(ballot):
    answers, weights = [answer for answer, _ in ballot], [weight for _, weight in ballot]
    classes = dict.fromkeys(answer for answer in answers if answer is not None)

    def rank(name):
        members = [i for i, answer in enumerate(answers) if answer == name]
        return float(sum(Fraction(weights[i]) for i in members)), len(members), -members[0]

    winner = max(classes, key=rank, default=None)
    expected = None if winner is None else answers.index(winner)
    assert majority_vote(answers, weights=weights) == expected


@given(ballots, st.randoms(use_true_random=False))
@fast
def test_the_winning_answer_without_ties_does_not_depend_on_the_order(ballot, rng):
    answers = [answer for answer, _ in ballot]
    counts = sorted((answers.count(name) for name in set(answers) - {None}), reverse=True)
    shuffled = rng.sample(answers, len(answers))
    first, second = majority_vote(answers), majority_vote(shuffled)
    if len(counts) < 2 or counts[0] > counts[1]:
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert answers[first] == shuffled[second]


@given(ballots)
@fast
def test_the_best_is_answered_and_no_answered_one_is_better(ballot):
    answers, scores = [answer for answer, _ in ballot], [score for _, score in ballot]
    best = best_of(answers, scores)
    if best is None:
        assert set(answers) == {None}
    else:
        assert answers[best] is not None
        assert all(scores[i] <= scores[best] for i, answer in enumerate(answers) if answer is not None)


@given(st.integers(1, 9), st.data())
@fast
def test_pass_at_k_is_the_share_of_all_subsets_and_the_closed_form(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    closed = 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(closed, abs=1e-12)


@given(ballots, st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_curves_end_at_the_votes_over_all_responses(ballot, data):
    answers, scores = [answer for answer, _ in ballot], [score for _, score in ballot]
    right = data.draw(st.sampled_from(["a", "b", "c"]))
    correct = [float(answer == right) for answer in answers]
    curves = voting_curves([answers], [correct], [scores], subsets=5)
    best = best_of(answers, scores)
    # the first seen of equal scores: in the curves each of them is that equally often
    tied = [] if best is None else [i for i, a in enumerate(answers) if a and scores[i] == scores[best]]
    assert curves.best[0, -1] == pytest.approx(sum(correct[i] for i in tied) / max(1, len(tied)))
    assert curves.pass_rate[0, -1] == float(any(correct))
    weighted = majority_vote(answers, weights=scores)
    totals = {
        name: (
            float(sum(Fraction(s) for a, s in zip(answers, scores) if a == name)),
            answers.count(name),
        )
        for name in set(answers) - {None}
    }
    if len(set(totals.values())) == len(totals):  # without ties every order gives this
        assert curves.weighted_majority[0, -1] == (0.0 if weighted is None else correct[weighted])


@given(scored)
@fast
def test_auroc_and_brier_are_scikit_learns(pairs):
    scores, labels = [score for score, _ in pairs], [int(label) for _, label in pairs]
    metrics = verification_metrics(scores, labels)
    clamped = [min(max(score, 0.0), 1.0) for score in scores]
    assert metrics.brier == pytest.approx(brier_score_loss(labels, clamped), abs=1e-12)
    if len(set(labels)) == 2:
        assert (
            metrics.auroc == auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        )
    else:
        assert math.isnan(metrics.auroc)


@given(scored)
@fast
def test_ece_is_the_sum_over_ten_bins(pairs):
    expected = 0.0
    for place in range(10):
        inside = [
            (min(max(score, 0.0), 1.0), label)
            for score, label in pairs
            if min(int(min(max(score, 0.0), 1.0) * 10), 9) == place
        ]
        if inside:
            gap = sum(label for _, label in inside) - sum(score for score, _ in inside)
            expected += abs(gap) / len(pairs)
    ece = verification_metrics([score for score, _ in pairs], [label for _, label in pairs]).ece
    assert ece == pytest.approx(expected, abs=1e-9)


VALUES = {None: None, "5": 5, "05": 5, " 5 ": 5, "$5$": 5, "6": 6, "+6": 6, "-6": -6}


@given(st.lists(st.sampled_from(list(VALUES)), max_size=10))
@fast
def test_two_answers_share_a_class_exactly_where_they_are_equal_in_whatever_order(answers):
    classes = equivalence_classes(answers)  # integers and strings only: no worker is needed
    for (left, first), (right, second) in itertools.combinations(zip(answers, classes), 2):
        assert (VALUES[left] == VALUES[right]) == (first == second)
    assert [number is None for number in classes] == [answer is None for answer in answers]
