"""Votes, best-of, pass@k, and their curves over the number of responses."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from megatron_laser.algorithms.voting import best_of, majority_vote, pass_at_k, voting_curves


def reference_vote(answers, weights=None):
    """Exact rational sums, compared as what they round to in float64."""
    best, best_rank = None, None
    for first, answer in enumerate(answers):
        if answer is None or answer in answers[:first]:
            continue
        members = [i for i, other in enumerate(answers) if other == answer]
        total = float(sum(Fraction(weights[i]) for i in members)) if weights is not None else 0.0
        rank = (total, len(members), -first)
        if best_rank is None or rank > best_rank:
            best, best_rank = first, rank
    return best


def reference_best(answers, scores):
    values = [-math.inf if score is None else score for score in scores]
    best = None
    for index, answer in enumerate(answers):
        if answer is not None and (best is None or values[index] > values[best]):
            best = index
    return best


def random_problems(count, n, seed=0):
    rng = np.random.default_rng(seed)
    answers = [
        [None if a == 0 else f"x{a}" for a in rng.integers(0, rng.integers(2, 7), n)] for _ in range(count)
    ]
    correct = [[float(a == "x1") for a in row] for row in answers]
    scores = [[None if s < 0.1 else round(float(s), 1) for s in rng.random(n) * 1.4] for _ in range(count)]
    return answers, correct, scores


def clamped(scores):
    return [0.0 if s is None else min(max(s, 0.0), 1.0) for s in scores]


def test_most_votes_win_and_ties_go_to_the_first_seen():
    assert majority_vote(["a", "b", "b", "c"]) == 1
    assert majority_vote(["a", "b", "b", "a"]) == 0
    assert majority_vote(["c", "b", "a", "a", "b"]) == 1


def test_abstentions_do_not_vote():
    assert majority_vote([None, None, None, "a"]) == 3
    assert majority_vote([None, None]) is None
    assert majority_vote([]) is None
    assert majority_vote([None], weights=[1.0]) is None


def test_any_hashable_class_key_votes():
    assert majority_vote([0, ("x", 1), ("x", 1), 0, 0]) == 0
    assert majority_vote(["", ""]) == 0


def test_weights_win_over_counts_then_counts_then_first_seen():
    assert majority_vote(["a", "a", "b"], weights=[0.2, 0.2, 0.9]) == 2
    assert majority_vote(["b", "a", "a"], weights=[0.5, 0.25, 0.25]) == 1
    assert majority_vote(["b", "a"], weights=[0.5, 0.5]) == 0


def test_without_any_weight_the_vote_is_the_majority():
    assert majority_vote(["a", "b", "b"], weights=[0.0, 0.0, 0.0]) == 1


def test_equal_sums_of_weights_are_a_tie_in_every_order():
    # 0.1 + 0.2 + 0.3 is 0.6 or 0.6000000000000001, depending on the order of plain additions.
    votes = [("a", 0.1), ("a", 0.2), ("a", 0.3), ("b", 0.3), ("b", 0.2), ("b", 0.1)]
    for order in itertools.permutations(votes):
        answers, weights = zip(*order)
        assert majority_vote(answers, weights=weights) == 0


def test_vote_is_the_reference_on_random_ballots():
    answers, _, scores = random_problems(200, 9)
    for row, row_scores in zip(answers, scores):
        assert majority_vote(row) == reference_vote(row)
        weights = clamped(row_scores)
        assert majority_vote(row, weights=weights) == reference_vote(row, weights)
        assert best_of(row, row_scores) == reference_best(row, row_scores)


def test_best_is_the_highest_raw_score_among_the_answered():
    assert best_of(["a", "b", "c"], [1.2, 3.4, 2.0]) == 1
    assert best_of(["a", None, "c"], [1.2, 3.4, 2.0]) == 2
    assert best_of(["a", "b"], [0.5, 0.5]) == 0
    assert best_of(["a", "b"], [-2.0, -1.0]) == 1
    assert best_of([None, None], [1.0, 2.0]) is None


def test_an_unscored_response_is_chosen_only_when_nothing_else_has_an_answer():
    assert best_of(["a", "b"], [None, -9.0]) == 1
    assert best_of(["a", "b"], [math.nan, -math.inf]) == 0
    assert best_of([None, "b"], [3.0, None]) == 1


def test_pass_at_k_is_the_share_of_subsets_with_a_right_response():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share)


def test_pass_at_k_of_many_samples_is_finite():
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5)
    assert pass_at_k(2000, 0, 1000) == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(n, c, k)


def test_curves_of_votes_are_those_of_the_plain_functions_on_the_same_orders():
    answers, correct, scores = random_problems(12, 7)
    # The winner's first response decides, also where responses of one class were graded differently.
    correct[0] = [1.0, 0.0] * 3 + [1.0]
    subsets, seed = 40, 5
    curves = voting_curves(answers, correct, scores, subsets=subsets, seed=seed)
    for row in range(12):
        orders = np.random.default_rng([seed, row]).permuted(np.tile(np.arange(7), (subsets, 1)), axis=1)
        weights = clamped(scores[row])
        for k in range(1, 8):
            right = {"majority": 0.0, "weighted": 0.0}
            for order in orders[:, :k].tolist():
                picked = [answers[row][i] for i in order]
                for name, chosen in (
                    ("majority", majority_vote(picked)),
                    ("weighted", majority_vote(picked, weights=[weights[i] for i in order])),
                ):
                    right[name] += 0.0 if chosen is None else correct[row][order[chosen]]
            assert curves.majority[row, k - 1] == pytest.approx(right["majority"] / subsets)
            assert curves.weighted_majority[row, k - 1] == pytest.approx(right["weighted"] / subsets)


def test_curves_of_average_pass_and_best_are_exact_over_all_subsets():
    answers, correct, scores = random_problems(10, 5, seed=2)
    curves = voting_curves(answers, correct, scores, subsets=1)
    for row in range(10):
        for k in range(1, 6):
            subsets = list(itertools.permutations(range(5), k))  # scores tie: the first seen wins
            average = passed = best = 0.0
            for subset in subsets:
                average += sum(correct[row][i] for i in subset) / k
                passed += any(correct[row][i] for i in subset)
                chosen = best_of([answers[row][i] for i in subset], [scores[row][i] for i in subset])
                best += 0.0 if chosen is None else correct[row][subset[chosen]]
            assert curves.average[row, k - 1] == pytest.approx(average / len(subsets))
            assert curves.pass_rate[row, k - 1] == pytest.approx(passed / len(subsets))
            assert curves.best[row, k - 1] == pytest.approx(best / len(subsets))


def test_the_best_of_equal_scores_is_any_of_them_wherever_they_stand():
    # A position rule would give 1 or 0, by where the right response happens to stand.
    scores = [[0.5, 0.5, 0.5, 0.5]]
    for place in range(4):
        correct = [[float(i == place) for i in range(4)]]
        curves = voting_curves([["a", "b", "c", "d"]], correct, scores)
        assert curves.best[0] == pytest.approx([0.25] * 4)
        assert curves.best[0] == pytest.approx(curves.average[0])
    # without scores too, and never one that has no answer
    curves = voting_curves([["a", None, "b"]], [[1.0, 1.0, 0.0]], [[None, None, None]])
    assert curves.best[0] == pytest.approx([1 / 3, 0.5, 0.5])


def test_weighted_curves_call_equal_sums_a_tie():
    # With all six responses both classes weigh 0.6 and have three votes: the first seen wins.
    answers = [["a", "a", "a", "b", "b", "b"]]
    correct = [[1.0] * 3 + [0.0] * 3]
    scores = [[0.1, 0.2, 0.3, 0.3, 0.2, 0.1]]
    curves = voting_curves(answers, correct, scores, subsets=64, seed=1)
    orders = np.random.default_rng([1, 0]).permuted(np.tile(np.arange(6), (64, 1)), axis=1)
    assert curves.weighted_majority[0, -1] == np.mean(orders[:, 0] < 3)


def test_curves_repeat_with_the_seed_and_do_not_depend_on_other_problems():
    answers, correct, scores = random_problems(6, 8)
    first = voting_curves(answers, correct, scores, subsets=20, seed=3)
    again = voting_curves(answers, correct, scores, subsets=20, seed=3)
    fewer = voting_curves(answers[:2], correct[:2], scores[:2], subsets=20, seed=3)
    other = voting_curves(answers, correct, scores, subsets=20, seed=4)
    for a, b, c in zip(first, again, fewer):
        assert np.array_equal(a, b) and np.array_equal(a[:2], c)
    assert not np.array_equal(first.majority, other.majority)


def test_curves_stop_at_max_k_and_take_problems_of_several_sizes():
    answers = [["a", "b", "a"], [None, None, None, None]]
    correct = [[1.0, 0.0, 1.0], [0.0] * 4]
    scores = [[0.5, 0.9, 0.2], [None] * 4]
    curves = voting_curves(answers, correct, scores, max_k=2, subsets=10)
    assert all(curve.shape == (2, 2) for curve in curves)
    assert all(np.array_equal(curve[1], np.zeros(2)) for curve in curves)
    assert voting_curves(answers, correct, scores, subsets=10).best.shape == (2, 3)


def test_curves_of_a_large_evaluation_take_seconds():
    answers, correct, scores = random_problems(500, 32)
    curves = voting_curves(answers, correct, scores, subsets=50)
    assert curves.weighted_majority.shape == (500, 32)


def test_errors_name_what_to_give():
    with pytest.raises(ValueError, match=r"weights\[1\] is nan.*clamp"):
        majority_vote(["a", "b"], weights=[0.5, math.nan])
    with pytest.raises(ValueError, match=r"weights\[0\] is -0\.5"):
        majority_vote(["a"], weights=[-0.5])
    with pytest.raises(ValueError, match="lengths differ"):
        best_of(["a"], [0.5, 0.5])
    with pytest.raises(ValueError, match="max_k is 3"):
        voting_curves([["a", "b"]], [[1.0, 0.0]], [[0.5, 0.5]], max_k=3)
    with pytest.raises(ValueError, match="subsets is 0"):
        voting_curves([["a"]], [[1.0]], [[0.5]], subsets=0)
    with pytest.raises(ValueError, match="no problem"):
        voting_curves([], [], [])
