"""The last-token self-reward: score, class weights, loss, and the partition condition."""

import math

import pytest
import torch

from megatron_laser.algorithms.self_reward import (
    class_weights,
    partition_excess,
    self_reward_loss,
    self_reward_scores,
)

REF, BETA = -23.0, 0.1  # Qwen2.5 in the paper


def reference_loss(scores, labels, weights=True, targets=(1.0, 0.0)):
    """1/N sum of w (r_s - target)^2 over the whole batch, as a plain loop."""
    n = len(scores)
    if n == 0:
        return 0.0
    n_c = sum(1 for label in labels if label == 1)
    n_i = n - n_c
    total = 0.0
    for score, label in zip(scores, labels):
        weight = (n / (2 * n_c) if label == 1 else n / (2 * n_i)) if weights else 1.0
        total += weight * (score - (targets[0] if label == 1 else targets[1])) ** 2
    return total / n


def random_batch(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator, dtype=torch.float64)
    labels = (torch.rand(n, generator=generator) < 0.3).double()
    labels[0], labels[1] = 1.0, 0.0
    return scores, labels


def weights_of(labels):
    return class_weights(int(labels.sum()), int(labels.numel() - labels.sum()))


def test_score_is_0_at_the_reference_and_1_a_factor_e_to_the_one_over_beta_above_it():
    scores = self_reward_scores(torch.tensor([-23.0, -13.0, -18.0]), ref_logprob=REF, beta=BETA)
    torch.testing.assert_close(scores, torch.tensor([0.0, 1.0, 0.5]))


def test_scores_are_on_the_scale_of_their_targets():
    """1 is where right responses are trained to, 0 where wrong ones are; (1, 0) leaves the score as it is."""
    logprobs = torch.tensor([-13.0, -23.0, -28.0, -15.5])
    raw = self_reward_scores(logprobs, ref_logprob=REF, beta=BETA)
    assert torch.equal(self_reward_scores(logprobs, ref_logprob=REF, beta=BETA, targets=(1.0, 0.0)), raw)
    scores = self_reward_scores(logprobs, ref_logprob=REF, beta=BETA, targets=(1.0, -0.5))
    torch.testing.assert_close(scores, torch.tensor([1.0, 1 / 3, 0.0, 5 / 6]))
    with pytest.raises(ValueError, match=r"laser\.targets is \[0, 0\]"):
        self_reward_scores(logprobs, ref_logprob=REF, beta=BETA, targets=(0.0, 0.0))


def test_scores_take_a_reference_per_sample():
    reference = torch.tensor([-23.0, -21.0])
    scores = self_reward_scores(torch.tensor([-13.0, -13.0]), ref_logprob=reference, beta=BETA)
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.8]))


def test_scores_of_bfloat16_logprobs_are_float32():
    scores = self_reward_scores(torch.tensor([-13.0], dtype=torch.bfloat16), ref_logprob=REF, beta=BETA)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match=r"laser\.beta"):
        self_reward_scores(torch.zeros(1), ref_logprob=REF, beta=beta)
    with pytest.raises(ValueError, match=r"laser\.beta"):
        partition_excess(REF, beta)


def test_class_weights_give_both_classes_half_of_the_batch():
    right, wrong = class_weights(2, 6)
    assert (right, wrong) == (2.0, 8 / 12)
    assert 2 * right == pytest.approx(4) and 6 * wrong == pytest.approx(4)


def test_class_weight_of_an_absent_class_is_0_and_of_the_only_class_one_half():
    assert class_weights(5, 0) == (0.5, 0.0)
    assert class_weights(0, 5) == (0.0, 0.5)
    assert class_weights(0, 0) == (0.0, 0.0)


def test_class_weights_refuse_a_negative_count():
    with pytest.raises(ValueError, match="num_incorrect is -1"):
        class_weights(1, -1)


@pytest.mark.parametrize("targets", [(1.0, 0.0), (0.8, -0.2)])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_is_the_formula(targets, weighted):
    scores, labels = random_batch(37)
    loss = self_reward_loss(
        scores,
        labels,
        class_weights=weights_of(labels) if weighted else (1.0, 1.0),
        num_scored=37,
        targets=targets,
    )
    expected = reference_loss(scores.tolist(), labels.tolist(), weighted, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_loss_and_gradient_do_not_depend_on_how_the_batch_is_cut(kind):
    logprobs, labels = random_batch(24)
    logprobs = (-3.0 - logprobs.abs()).requires_grad_()

    def loss_of(rows):
        scores = self_reward_scores(logprobs[rows], ref_logprob=REF, beta=BETA)
        return self_reward_loss(
            scores,
            labels[rows],
            class_weights=weights_of(labels),
            num_scored=24,
            kind=kind,
            ref_logprob=REF,
            beta=BETA,
        )

    whole = loss_of(torch.arange(24))
    (whole_grad,) = torch.autograd.grad(whole, logprobs)
    for sizes in ([1] * 24, [12, 12], [5, 0, 19], [23, 1]):
        parts = [loss_of(rows) for rows in torch.arange(24).split(sizes)]
        (grad,) = torch.autograd.grad(sum(parts), logprobs)
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, whole_grad, rtol=1e-12, atol=0)


def test_released_loss_depends_on_the_cut_and_on_truncated_rows_where_ours_is_the_formula():
    """The released code averages over the rows of each micro-batch, truncated ones included as 0.

    Four responses: right 0.5, wrong 0.5, wrong 1.0, and one truncated. N = 3, N_c = 1, N_i = 2, so w(1) = 3/2
    and w(0) = 3/4. Weighted errors: 1.5 * 0.25 = 0.375, 0.75 * 0.25 = 0.1875, 0.75 * 1 = 0.75.
    L_sr = (0.375 + 0.1875 + 0.75) / 3 = 0.4375.
    """
    weighted_errors = [0.375, 0.1875, 0.75, 0.0]

    def released(*cuts):
        means = [sum(weighted_errors[i] for i in cut) / len(cut) for cut in cuts]
        return sum(means) / len(means)

    assert released([0, 1, 2, 3]) == pytest.approx(0.328125)
    assert released([0], [1, 2, 3]) == pytest.approx(0.34375)
    assert released([0, 1, 2], [3]) == pytest.approx(0.21875)

    scores = torch.tensor([0.5, 0.5, 1.0])
    labels = torch.tensor([1.0, 0.0, 0.0])
    for cuts in ([[0, 1, 2]], [[0], [1, 2]], [[0, 1, 2], []]):
        parts = [
            self_reward_loss(scores[cut], labels[cut], class_weights=class_weights(1, 2), num_scored=3)
            for cut in (torch.tensor(cut, dtype=torch.long) for cut in cuts)
        ]
        assert sum(parts).item() == pytest.approx(0.4375)


@pytest.mark.parametrize("num_scored", [0, 7])
@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_a_rank_without_scored_rows_returns_a_zero_that_has_a_gradient(kind, num_scored):
    logits = torch.randn(6, requires_grad=True)
    scores = self_reward_scores(logits[:0], ref_logprob=REF, beta=BETA)
    loss = self_reward_loss(
        scores,
        torch.zeros(0),
        class_weights=(0.0, 0.0),
        num_scored=num_scored,
        kind=kind,
        ref_logprob=REF,
        beta=BETA,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(6))


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_an_absent_class_leaves_a_finite_loss(label):
    scores = torch.tensor([0.25, 0.75])
    labels = torch.full((2,), label)
    loss = self_reward_loss(scores, labels, class_weights=weights_of(labels), num_scored=2)
    assert loss.item() == pytest.approx(0.5 * (0.0625 + 0.5625) / 2)


def test_cross_entropy_is_that_of_the_score_tokens_probability():
    logprobs = torch.tensor([-25.0, -1.0, -0.1, -1e-3], dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    scores = self_reward_scores(logprobs, ref_logprob=REF, beta=BETA)
    loss = self_reward_loss(
        scores, labels, class_weights=(1.5, 0.5), num_scored=4, kind="bce", ref_logprob=REF, beta=BETA
    )
    expected = 0.0
    for logprob, label in zip(logprobs.tolist(), labels.tolist()):
        p = math.exp(logprob)
        expected -= 1.5 * math.log(p) if label else 0.5 * math.log(1 - p)
    assert loss.item() == pytest.approx(expected / 4, rel=1e-10)


def test_cross_entropy_of_a_certain_wrong_answer_is_finite_and_still_pushes_down():
    logprobs = torch.tensor([0.0], requires_grad=True)
    loss = self_reward_loss(
        self_reward_scores(logprobs, ref_logprob=REF, beta=BETA),
        torch.tensor([0.0]),
        class_weights=(1.0, 1.0),
        num_scored=1,
        kind="bce",
        ref_logprob=REF,
        beta=BETA,
    )
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(logprobs.grad.item()) and logprobs.grad.item() > 0


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_loss_gradients_are_those_of_finite_differences(kind):
    logprobs, labels = random_batch(6)
    logprobs = (-0.05 - 3 * logprobs.abs()).requires_grad_()

    def loss(x):
        scores = self_reward_scores(x, ref_logprob=-9.0, beta=0.3)
        return self_reward_loss(
            scores,
            labels,
            class_weights=weights_of(labels),
            num_scored=6,
            kind=kind,
            ref_logprob=-9.0,
            beta=0.3,
        )

    assert torch.autograd.gradcheck(loss, (logprobs,))


def test_loss_refuses_a_local_count_in_place_of_the_global_one():
    with pytest.raises(ValueError, match="num_scored is 1 but 2 rows"):
        self_reward_loss(torch.zeros(2), torch.zeros(2), class_weights=(1.0, 1.0), num_scored=1)


def test_loss_names_the_setting_that_is_wrong():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"laser\.loss is 'mae'"):
        self_reward_loss(one, one, class_weights=(1.0, 1.0), num_scored=1, kind="mae")
    with pytest.raises(ValueError, match=r"needs pi\(z_c\)"):
        self_reward_loss(one, one, class_weights=(1.0, 1.0), num_scored=1, kind="bce")
    with pytest.raises(ValueError, match=r"laser\.targets"):
        self_reward_loss(
            one,
            one,
            class_weights=(1.0, 1.0),
            num_scored=1,
            kind="bce",
            targets=(0.9, 0.0),
            ref_logprob=REF,
            beta=BETA,
        )
    with pytest.raises(ValueError, match=r"\[rows\]"):
        self_reward_loss(torch.zeros(2), one, class_weights=(1.0, 1.0), num_scored=2)


def test_partition_excess_is_negligible_for_the_papers_setting():
    assert partition_excess(-23.0, 0.1) == pytest.approx(math.exp(-23) * (math.exp(10) - 1), rel=1e-12)
    assert partition_excess(-23.0, 0.1) == pytest.approx(2.3e-6, rel=0.03)


def test_partition_excess_shows_what_a_small_vocabulary_asks_for():
    assert partition_excess(-11.0, 0.1) == pytest.approx(math.exp(-1), rel=1e-4)


def test_partition_excess_neither_overflows_nor_loses_small_gains():
    assert partition_excess(-23.0, 1e-3) == math.inf
    assert partition_excess(-1000.0, 1e-3) == pytest.approx(1.0)
    assert partition_excess(-5.0, 1e6) == pytest.approx(math.exp(-5) * 1e-6, rel=1e-6)
    assert partition_excess(-math.inf, 0.1) == 0.0


def test_partition_excess_follows_the_target():
    assert partition_excess(-23.0, 0.1, target=0.5) == pytest.approx(math.exp(-23) * math.expm1(5))
    assert partition_excess(-23.0, 0.1, target=0.0) == 0.0


def test_partition_excess_refuses_a_positive_logprob():
    with pytest.raises(ValueError, match=r"laser\.ref_logprob is 23"):
        partition_excess(23.0, 0.1)
