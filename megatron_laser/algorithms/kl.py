"""KL estimates from log-probabilities of sampled tokens: the penalty, and the rollout/trainer mismatch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_laser.algorithms.numerics import at_least_float32

KLEstimator = Literal["k1", "k2", "k3"]

_LARGEST_LOG_RATIO = 20.0  # keeps exp() and its gradient finite in float32


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: KLEstimator) -> Tensor:
    """Estimate of KL(policy || reference) for each row (Schulman 2020, "Approximating KL Divergence").

    With d = log pi_ref - log pi:
    k1 = -d, unbiased, but as a *loss* its expected gradient is 0: for reporting.
    k2 = d^2 / 2, biased, and its expected on-policy gradient is exactly that of the KL.
    k3 = exp(d) - d - 1, unbiased, never negative: GRPO's (arXiv 2402.03300).

    Args:
        logprobs: [rows], of the policy that is trained.
        ref_logprobs: [rows], of the reference; no gradient.

    Returns:
        [rows], at least float32, differentiable in `logprobs`.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"logprobs {tuple(logprobs.shape)} and ref_logprobs {tuple(ref_logprobs.shape)} must have one "
            "shape [rows]: pass one entry per response token"
        )
    d = ref_logprobs.detach() - at_least_float32(logprobs)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d**2
    if kind == "k3":
        return _k3(d)
    raise ValueError(f"policy.kl_estimator is {kind!r}; expected k1, k2 or k3")


class Mismatch(NamedTuple):
    """How far the trainer's log-probs are from the engine's. Float64 scalars, without gradient.

    To reduce over ranks add `count`, `diff_sum` and `k3_sum`, and take the largest `diff_max`.
    """

    count: Tensor  # rows
    diff_sum: Tensor  # sum of |trainer - rollout| in nats; divided by count it is logprob_diff_mean
    diff_max: Tensor  # logprob_diff_max; 0 without rows
    k3_sum: Tensor  # divided by count, the k3 estimate of KL(rollout || trainer), rollout_k3_kl


def mismatch(trainer_logprobs: Tensor, rollout_logprobs: Tensor) -> Mismatch:
    """Compare both sides' log-probs, [rows], of the same sampled tokens under the same weights."""
    if trainer_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(
            f"trainer_logprobs {tuple(trainer_logprobs.shape)} and rollout_logprobs "
            f"{tuple(rollout_logprobs.shape)} must have one shape [rows]: pass one entry per response token"
        )
    d = trainer_logprobs.detach().double() - rollout_logprobs.detach().double()
    diff = d.abs()
    return Mismatch(
        count=diff.new_tensor(diff.numel()),
        diff_sum=diff.sum(),
        diff_max=diff.max() if diff.numel() else diff.new_zeros(()),
        k3_sum=_k3(d).sum(),
    )


def _k3(d: Tensor) -> Tensor:
    # expm1, because exp(d) - 1 - d loses every digit of a KL near 0 in float32.
    return torch.expm1(d.clamp(max=_LARGEST_LOG_RATIO)) - d
