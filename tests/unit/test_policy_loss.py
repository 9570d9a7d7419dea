"""The clipped policy loss, its aggregation weights, and the importance weights."""

import math

import pytest
import torch

from megatron_laser.algorithms.policy_loss import importance_weights, policy_loss, sequence_token_weights

MODES = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"]
LENGTHS = [3, 0, 7, 1, 5]  # 0: an empty response
MAX_NEW_TOKENS = 8


def reference_row(logprob, old, advantage, low, high, dual=None):
    """One row's loss, and whether it was clipped."""
    ratio = math.exp(logprob - old)
    clamped = min(max(ratio, 1 - low), 1 + high)
    loss = max(-ratio * advantage, -clamped * advantage)
    clipped = -clamped * advantage > -ratio * advantage
    if dual is not None and advantage < 0 and loss > -dual * advantage:
        return -dual * advantage, True
    return loss, clipped


def reference_aggregate(rows_per_sample, mode):
    """The aggregation of per-row values, straight from its name."""
    rows = [value for sample in rows_per_sample for value in sample]
    samples = len(rows_per_sample)
    if mode == "token_mean":
        return sum(rows) / len(rows)
    if mode == "sequence_mean_token_mean":
        return sum(sum(sample) / len(sample) for sample in rows_per_sample if sample) / samples
    if mode == "sequence_mean_token_sum":
        return sum(sum(sample) for sample in rows_per_sample) / samples
    return sum(rows) / (samples * MAX_NEW_TOKENS)


def random_rows(seed=0, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(LENGTHS)
    old = -torch.rand(rows, generator=generator, dtype=torch.float64) * 3
    logprobs = old + spread * torch.randn(rows, generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    sample_of_row = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return logprobs.requires_grad_(), old, advantages[sample_of_row], sample_of_row


def weights_of(mode, lengths=None, num_samples=None):
    return sequence_token_weights(
        torch.tensor(LENGTHS if lengths is None else lengths),
        mode,
        num_samples=len(LENGTHS) if num_samples is None else num_samples,
        num_tokens=sum(LENGTHS),
        max_new_tokens=MAX_NEW_TOKENS,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dual", [None, 1.3])
def test_loss_is_the_formula_and_clipped_rows_are_counted_alike_in_every_aggregation(mode, dual):
    logprobs, old, advantages, sample_of_row = random_rows()
    weights = weights_of(mode)[sample_of_row]
    result = policy_loss(logprobs, old, advantages, weights, clip_low=0.2, clip_high=0.28, dual_clip=dual)
    losses, clips = [[] for _ in LENGTHS], [[] for _ in LENGTHS]
    for row, sample in enumerate(sample_of_row.tolist()):
        loss, clipped = reference_row(
            logprobs[row].item(), old[row].item(), advantages[row].item(), 0.2, 0.28, dual
        )
        losses[sample].append(loss)
        clips[sample].append(float(clipped))
    assert any(any(sample) for sample in clips)
    assert result.loss.item() == pytest.approx(reference_aggregate(losses, mode), rel=1e-6)
    assert result.clipped.item() == sum(map(sum, clips))
    d = (logprobs - old).detach()
    assert result.approx_kl.item() == pytest.approx((d.exp() - 1 - d).sum().item(), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_loss_does_not_depend_on_how_the_rows_are_cut(mode):
    logprobs, old, advantages, sample_of_row = random_rows()
    weights = weights_of(mode)[sample_of_row]

    def loss_of(rows):
        return policy_loss(
            logprobs[rows], old[rows], advantages[rows], weights[rows], clip_low=0.2, clip_high=0.2
        )

    rows = torch.arange(logprobs.numel())
    whole = loss_of(rows)
    (whole_grad,) = torch.autograd.grad(whole.loss, logprobs)
    for sizes in ([1] * 16, [8, 8], [0, 16], [3, 0, 12, 1]):
        parts = [loss_of(part) for part in rows.split(sizes)]
        (grad,) = torch.autograd.grad(sum(part.loss for part in parts), logprobs)
        torch.testing.assert_close(grad, whole_grad, rtol=1e-12, atol=0)
        for name in ("loss", "clipped", "approx_kl"):
            total = sum(getattr(part, name) for part in parts)
            torch.testing.assert_close(total, getattr(whole, name), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_weights_do_not_depend_on_which_samples_a_rank_holds(mode):
    whole = weights_of(mode)
    parts = [weights_of(mode, lengths, len(LENGTHS)) for lengths in ([], LENGTHS[:2], LENGTHS[2:])]
    assert torch.equal(torch.cat(parts), whole)


def test_weights_of_means_sum_to_one_over_the_batch():
    lengths = torch.tensor(LENGTHS)
    assert (weights_of("token_mean") * lengths).sum().item() == pytest.approx(1.0)
    # The empty response is one of the five samples and has no rows.
    assert (weights_of("sequence_mean_token_mean") * lengths).sum().item() == pytest.approx(4 / 5)
    assert weights_of("constant_length").tolist() == pytest.approx([1 / 40] * 5)
    assert weights_of("sequence_mean_token_sum").tolist() == pytest.approx([1 / 5] * 5)


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_finite_for_a_batch_of_empty_responses(mode):
    weights = sequence_token_weights(
        torch.tensor([0, 0]), mode, num_samples=2, num_tokens=0, max_new_tokens=MAX_NEW_TOKENS
    )
    assert weights.dtype == torch.float32 and torch.isfinite(weights).all()


def test_on_policy_gradient_is_the_policy_gradient():
    logprobs, _, advantages, sample_of_row = random_rows()
    weights = weights_of("token_mean")[sample_of_row]
    result = policy_loss(logprobs, logprobs.detach(), advantages, weights, clip_low=0.2, clip_high=0.2)
    (grad,) = torch.autograd.grad(result.loss, logprobs)
    torch.testing.assert_close(grad, -(weights * advantages).double(), rtol=1e-12, atol=0)
    assert result.loss.item() == pytest.approx(-(weights * advantages).sum().item(), rel=1e-12)
    assert result.clipped.item() == 0.0 and result.approx_kl.item() == 0.0


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_on_policy_gradient_survives_a_clip_range_of_any_width(clip):
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages, weights = torch.tensor([1.0, -1.0]), torch.ones(2)
    result = policy_loss(logprobs, logprobs.detach(), advantages, weights, clip_low=clip, clip_high=clip)
    result.loss.backward()
    assert logprobs.grad.tolist() == [-1.0, 1.0]


def test_gradient_stops_where_the_ratio_has_moved_far_enough_the_right_way():
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5])
    logprobs = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    result = policy_loss(logprobs, torch.zeros(4), advantages, torch.ones(4), clip_low=0.2, clip_high=0.2)
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5, 1.5, 0.0]))
    assert result.clipped.item() == 2.0


def test_dual_clip_bounds_only_rows_with_a_negative_advantage():
    logprobs = torch.tensor([5.0, 5.0]).log().requires_grad_()
    result = policy_loss(
        logprobs,
        torch.zeros(2),
        torch.tensor([-1.0, 1.0]),
        torch.ones(2),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(3.0 - 1.2)
    assert logprobs.grad.tolist() == [0.0, 0.0]
    assert result.clipped.item() == 2.0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_absurd_ratios_leave_finite_values_and_gradients(advantage):
    logprobs = torch.tensor([0.0, -400.0], requires_grad=True)
    old = torch.tensor([-400.0, 0.0])
    result = policy_loss(
        logprobs, old, torch.full((2,), advantage), torch.ones(2), clip_low=0.2, clip_high=0.2
    )
    result.loss.backward()
    assert all(torch.isfinite(value) for value in (result.loss, result.clipped, result.approx_kl))
    assert torch.isfinite(logprobs.grad).all()


def test_approx_kl_is_the_k3_estimate_from_the_old_policy():
    logprobs, old, advantages, _ = random_rows()
    weights = torch.full((16,), 1 / 16)
    result = policy_loss(logprobs, old, advantages, weights, clip_low=0.2, clip_high=0.2)
    d = logprobs.detach() - old
    assert result.approx_kl.item() == pytest.approx((d.exp() - 1 - d).sum().item(), rel=1e-6)


@pytest.mark.parametrize("dual", [None, 1.3])
def test_loss_gradients_are_those_of_finite_differences(dual):
    logprobs, old, advantages, sample_of_row = random_rows()
    weights = weights_of("sequence_mean_token_mean")[sample_of_row].double()
    factors = importance_weights(old, old - 0.1, 2.0)

    def loss(x):
        return policy_loss(
            x,
            old,
            advantages,
            weights,
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=dual,
            importance_weights=factors,
        ).loss

    assert torch.autograd.gradcheck(loss, (logprobs,))


def test_only_the_trained_policy_gets_a_gradient():
    inputs = [torch.randn(4, requires_grad=True) for _ in range(5)]
    logprobs, old, advantages, weights, factors = inputs
    result = policy_loss(
        logprobs, old, advantages, weights, clip_low=0.2, clip_high=0.2, importance_weights=factors
    )
    result.loss.backward()
    assert logprobs.grad is not None
    assert all(tensor.grad is None for tensor in (old, advantages, weights, factors))
    assert not result.clipped.requires_grad and not result.approx_kl.requires_grad


def test_a_rank_without_rows_returns_a_zero_that_has_a_gradient():
    hidden = torch.randn(3, requires_grad=True)
    empty = torch.zeros(0)
    result = policy_loss(hidden[:0], empty, empty, empty, clip_low=0.2, clip_high=0.2)
    result.loss.backward()
    assert [value.item() for value in (result.loss, result.clipped, result.approx_kl)] == [0.0, 0.0, 0.0]
    assert torch.equal(hidden.grad, torch.zeros(3))


def test_importance_weights_are_truncated_and_detached():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    rollout = torch.tensor([-1.0, -1.5, -900.0, -math.inf])
    result = importance_weights(old, rollout, 2.0)
    torch.testing.assert_close(result, torch.tensor([1.0, math.exp(0.5), 2.0, 2.0]))
    assert not result.requires_grad


def test_importance_weights_multiply_the_rows_of_the_loss_only():
    logprobs, old, advantages, _ = random_rows()
    weights, factors = torch.rand(16), torch.rand(16)
    plain = policy_loss(logprobs, old, advantages, weights * factors, clip_low=0.2, clip_high=0.2)
    unweighted = policy_loss(logprobs, old, advantages, weights, clip_low=0.2, clip_high=0.2)
    result = policy_loss(
        logprobs, old, advantages, weights, clip_low=0.2, clip_high=0.2, importance_weights=factors
    )
    torch.testing.assert_close(result.loss, plain.loss, rtol=1e-6, atol=0)
    assert result.clipped == unweighted.clipped and result.approx_kl == unweighted.approx_kl


def test_errors_name_the_setting_or_the_shapes():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"old_logprobs.*\[rows\]"):
        policy_loss(one, torch.zeros(2), one, one, clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match=r"policy\.clip_low is 1\.5"):
        policy_loss(one, one, one, one, clip_low=1.5, clip_high=0.2)
    with pytest.raises(ValueError, match=r"policy\.dual_clip is 1\.0"):
        policy_loss(one, one, one, one, clip_low=0.2, clip_high=0.2, dual_clip=1.0)
    with pytest.raises(ValueError, match=r"policy\.importance_cap is 0"):
        importance_weights(one, one, 0.0)
    with pytest.raises(ValueError, match=r"policy\.loss_aggregation is 'mean'"):
        weights_of("mean")
    with pytest.raises(ValueError, match="num_samples is 2 but 5 lengths"):
        weights_of("token_mean", num_samples=2)
    with pytest.raises(ValueError, match=r"rollout\.max_new_tokens is 0"):
        sequence_token_weights(
            torch.tensor([1]), "constant_length", num_samples=1, num_tokens=1, max_new_tokens=0
        )
