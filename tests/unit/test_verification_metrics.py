"""Verification metrics against scikit-learn, scipy and hand-worked cases."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import brier_score_loss, roc_auc_score

from megatron_laser.algorithms.metrics import auroc, bootstrap_interval, spearman, verification_metrics


def random_scores(seed=0, n=200, decimals=None):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.4).astype(float)
    scores = rng.normal(0.3 + 0.4 * labels, 0.5)
    return (scores if decimals is None else scores.round(decimals)), labels


def test_accuracies_and_f1_by_hand():
    # Right: 0.9 and 0.6 above, 0.5 not (the decision is strict). Wrong: 0.4 below, 0.7 not.
    result = verification_metrics([0.9, 0.6, 0.5, 0.4, 0.7], [1, 1, 1, 0, 0])
    assert result.accuracy_correct == pytest.approx(2 / 3)
    assert result.accuracy_incorrect == pytest.approx(1 / 2)
    assert result.f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert result.accuracy == pytest.approx(3 / 5)


def test_f1_is_zero_when_no_decision_is_right():
    assert verification_metrics([0.1, 0.9], [1, 0]).f1 == 0.0


def test_threshold_moves_the_decision_only():
    scores, labels = random_scores()
    low, high = (verification_metrics(scores, labels, threshold=t) for t in (0.2, 0.8))
    assert low.accuracy_correct > high.accuracy_correct
    assert (low.auroc, low.ece, low.brier) == (high.auroc, high.ece, high.brier)


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_auroc_is_scikit_learns_with_and_without_ties(decimals):
    scores, labels = random_scores(decimals=decimals)
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)
    assert verification_metrics(scores, labels).auroc == auroc(scores, labels)


def test_auroc_by_hand_with_a_tie():
    # Pairs (right, wrong): 0.8 > 0.3, 0.8 > 0.5, 0.5 > 0.3, and 0.5 = 0.5 for a half.
    assert auroc([0.8, 0.5, 0.3, 0.5], [1, 1, 0, 0]) == pytest.approx(3.5 / 4)


def test_auroc_ranks_raw_scores_beyond_the_unit_interval():
    assert auroc([3.0, 2.0, -5.0, -math.inf], [1, 0, 1, 0]) == pytest.approx(0.75)


def test_brier_is_scikit_learns_on_clamped_scores():
    scores, labels = random_scores()
    assert (scores > 1).any() and (scores < 0).any()
    expected = brier_score_loss(labels, scores.clip(0, 1))
    assert verification_metrics(scores, labels).brier == pytest.approx(expected, rel=1e-12)


def test_ece_by_hand():
    # Bin [0, 0.1): -0.3 -> 0 (wrong), 0.05 (right): |1 - 0.05| / 2 = 0.475, share 2/6.
    # Bin [0.3, 0.4): 0.3 (wrong), 0.38 (wrong): mean 0.34, share 2/6.
    # Bin [0.9, 1]: 1.7 -> 1 (right), 0.9 (wrong): |0.5 - 0.95| = 0.45, share 2/6.
    result = verification_metrics([-0.3, 0.05, 0.3, 0.38, 1.7, 0.9], [0, 1, 0, 0, 1, 0])
    assert result.ece == pytest.approx((0.475 + 0.34 + 0.45) / 3)


def test_perfect_scores_have_perfect_metrics():
    result = verification_metrics([1.2, 1.0, 0.0, -0.1], [1, 1, 0, 0])
    assert result == (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("label", [0, 1])
def test_what_one_class_leaves_undefined_is_nan(label):
    result = verification_metrics([0.2, 0.8], [label, label])
    assert math.isnan(result.auroc) and math.isnan(result.f1)
    assert math.isnan(result.accuracy_correct) == (label == 0)
    assert math.isnan(result.accuracy_incorrect) == (label == 1)
    assert result.accuracy == 0.5 and math.isfinite(result.ece) and math.isfinite(result.brier)


def test_without_responses_everything_is_nan():
    assert all(math.isnan(value) for value in verification_metrics([], []))


def test_tensors_arrays_and_lists_give_the_same():
    scores, labels = random_scores(n=30)
    expected = verification_metrics(scores.tolist(), labels.tolist())
    assert verification_metrics(scores, labels.astype(bool)) == expected
    tensor = torch.tensor(scores, requires_grad=True)
    assert verification_metrics(tensor, torch.tensor(labels).long()) == expected
    assert list(expected._asdict()) == [
        "accuracy_correct",
        "accuracy_incorrect",
        "f1",
        "accuracy",
        "auroc",
        "ece",
        "brier",
    ]


def test_missing_scores_and_other_labels_are_refused():
    with pytest.raises(ValueError, match=r"scores\[1\] is NaN"):
        verification_metrics([0.5, math.nan], [1, 0])
    with pytest.raises(ValueError, match=r"labels\[1\] is 0\.5"):
        verification_metrics([0.5, 0.5], [1, 0.5])
    with pytest.raises(ValueError, match="2 scores and 1 labels"):
        verification_metrics([0.5, 0.5], [1])
    with pytest.raises(ValueError, match="one dimension"):
        verification_metrics([[0.5]], [[1]])


@pytest.mark.parametrize("decimals", [None, 1])
def test_spearman_is_scipys_with_and_without_ties(decimals):
    scores, _ = random_scores(decimals=decimals)
    lengths = np.random.default_rng(1).integers(1, 40, scores.size) + (10 * scores).astype(int)
    assert spearman(scores, lengths) == pytest.approx(spearmanr(scores, lengths).statistic, rel=1e-12)


def test_spearman_of_a_constant_is_nan():
    assert math.isnan(spearman([0.5, 0.5, 0.5], [1, 2, 3]))
    assert math.isnan(spearman([0.5], [1]))


def test_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_problems():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(values, seed=1, num_resamples=2000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_interval_repeats_with_its_seed_and_widens_with_its_level():
    values = list(np.random.default_rng(0).random(50))
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    wide, narrow = (bootstrap_interval(values, seed=1, level=level) for level in (0.99, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bootstrap_resamples_whole_problems():
    # All responses of a problem agree: 4 problems of 100 responses carry the uncertainty of 4, not of 400.
    problems = [[float(right)] * 100 for right in (0, 1, 0, 1)]
    low, high = bootstrap_interval(
        problems, seed=0, statistic=lambda rows: sum(map(sum, rows)) / sum(map(len, rows))
    )
    assert (low, high) == (0.0, 1.0)


def test_bootstrap_leaves_out_resamples_where_the_statistic_is_undefined():
    def area(rows):
        return auroc([s for s, _ in rows], [y for _, y in rows])

    low, high = bootstrap_interval([(0.9, 1), (0.1, 0), (0.8, 1)], seed=0, statistic=area)
    assert (low, high) == (1.0, 1.0)
    assert all(math.isnan(end) for end in bootstrap_interval([(0.9, 1)], seed=0, statistic=area))
    assert all(math.isnan(end) for end in bootstrap_interval([], seed=0))
