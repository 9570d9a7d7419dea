"""KL estimators and the mismatch between trainer and rollout."""

import math

import pytest
import torch

from megatron_laser.algorithms.kl import kl_penalty, mismatch


def logprob_rows(seed=0, rows=12):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, generator=generator, dtype=torch.float64) * 4
    reference = logprobs + 0.5 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return logprobs.requires_grad_(), reference


def test_estimators_are_their_formulas():
    logprobs, reference = logprob_rows()
    for row, (lp, ref) in enumerate(zip(logprobs.tolist(), reference.tolist())):
        d = ref - lp
        assert kl_penalty(logprobs, reference, "k1")[row].item() == pytest.approx(lp - ref)
        assert kl_penalty(logprobs, reference, "k2")[row].item() == pytest.approx(d * d / 2)
        assert kl_penalty(logprobs, reference, "k3")[row].item() == pytest.approx(math.exp(d) - d - 1)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("k1", lambda d: torch.ones_like(d)), ("k2", lambda d: -d), ("k3", lambda d: 1 - d.exp())],
)
def test_gradients_are_those_of_the_formulas(kind, factor):
    logprobs, reference = logprob_rows()
    (grad,) = torch.autograd.grad(kl_penalty(logprobs, reference, kind).sum(), logprobs)
    torch.testing.assert_close(grad, factor(reference - logprobs.detach()))
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, reference, kind), (logprobs,))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_on_a_whole_distribution(kind):
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    estimate = (policy * kl_penalty(policy.log(), reference.log(), kind)).sum()
    torch.testing.assert_close(estimate, exact)


def test_expected_gradient_is_the_kls_for_k2_and_zero_for_k1():
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(logits, 0)
    policy = logprobs.exp()
    (exact,) = torch.autograd.grad((policy * (logprobs - reference)).sum(), logits, retain_graph=True)

    def expected_gradient(kind):
        loss = (policy.detach() * kl_penalty(logprobs, reference, kind)).sum()
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    torch.testing.assert_close(expected_gradient("k2"), exact)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(3, dtype=torch.float64))


def test_k3_keeps_its_digits_near_zero_and_stays_finite_far_away():
    logprobs = torch.tensor([-1.0, 0.0, -500.0], requires_grad=True)
    reference = torch.tensor([-1.0 + 1e-3, -500.0, 0.0])
    penalty = kl_penalty(logprobs, reference, "k3")
    penalty.sum().backward()
    d = float(reference[0]) - float(logprobs.detach()[0])
    assert penalty[0].item() == pytest.approx(math.expm1(d) - d, rel=1e-3)
    assert torch.isfinite(penalty).all() and torch.isfinite(logprobs.grad).all()


def test_the_reference_gets_no_gradient():
    logprobs = torch.zeros(2, requires_grad=True)
    reference = torch.ones(2, requires_grad=True)
    kl_penalty(logprobs, reference, "k3").sum().backward()
    assert logprobs.grad is not None and reference.grad is None


def test_mismatch_is_the_plain_sums():
    trainer, rollout = logprob_rows()
    result = mismatch(trainer, rollout)
    diffs = [t - r for t, r in zip(trainer.tolist(), rollout.tolist())]
    assert result.count.item() == len(diffs)
    assert result.diff_sum.item() == pytest.approx(sum(abs(d) for d in diffs))
    assert result.diff_max.item() == pytest.approx(max(abs(d) for d in diffs))
    assert result.k3_sum.item() == pytest.approx(sum(math.exp(d) - 1 - d for d in diffs))
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in result)


def test_mismatch_of_parts_reduces_to_the_mismatch_of_the_whole():
    trainer, rollout = logprob_rows()
    whole = mismatch(trainer, rollout)
    parts = [mismatch(t, r) for t, r in zip(trainer.split([5, 0, 7]), rollout.split([5, 0, 7]))]
    torch.testing.assert_close(sum(part.diff_sum for part in parts), whole.diff_sum)
    torch.testing.assert_close(sum(part.k3_sum for part in parts), whole.k3_sum)
    assert sum(part.count for part in parts) == whole.count
    assert max(part.diff_max for part in parts) == whole.diff_max


def test_mismatch_without_rows_is_zero():
    assert [value.item() for value in mismatch(torch.zeros(0), torch.zeros(0))] == [0.0] * 4


def test_errors_name_the_setting_or_the_shapes():
    with pytest.raises(ValueError, match=r"policy\.kl_estimator is 'k4'"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
    with pytest.raises(ValueError, match=r"logprobs \(1,\) and ref_logprobs \(2,\)"):
        kl_penalty(torch.zeros(1), torch.zeros(2), "k3")
    with pytest.raises(ValueError, match=r"rollout_logprobs \(2,\)"):
        mismatch(torch.zeros(1), torch.zeros(2))
