"""Policy losses by name (`policy.loss`), each a function of labelled rows that returns a loss for every row.

A row is one response token. What is returned is neither weighted nor summed: the trainer multiplies by the row's weight
(`policy.loss_aggregation`), by importance weights, and adds up. So a loss does not depend on how a batch is cut. One
that looks at whole responses says so (`whole_responses`) and takes their means from the rows that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# exp(20) = 5e8: a ratio this far out is clipped or is a fault; past it float32 gradients would be inf * 0.
LARGEST_LOG_RATIO = 20.0

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class PolicyRows:
    """What a policy loss is made of; all [rows], float32 or float64.

    logprobs: of the policy that is trained, the only one with a gradient. old_logprobs: of the policy that the ratio is
    taken against. advantages: each response's on all its rows. average: see `response_mean`.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    average: Callable[[Tensor], Tensor] | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log pi - log pi_old, within +-20."""
        return (self.logprobs - self.old_logprobs).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)

    def response_mean(self, values: Tensor) -> Tensor:
        """The mean of `values` [rows] over all rows of each row's response, on each of them; without gradient.

        For losses marked with `whole_responses`; under context parallelism the ranks that share a response add up.
        """
        if self.average is None:
            raise RuntimeError("response_mean is for losses that are marked with @whole_responses")
        return self.average(values.detach())


class RowLosses(NamedTuple):
    """loss: [rows], with a gradient in the log-probs. clipped: [rows] bool, where a bound took the place of the plain
    objective (the metric `clip_fraction`)."""

    loss: Tensor
    clipped: Tensor


def whole_responses(function: _Function) -> _Function:
    """Mark a policy loss that uses `PolicyRows.response_mean`: it is then given all rows of a micro-batch at once."""
    function.whole_responses = True  # type: ignore[attr-defined]
    return function


def needs_whole_responses(function: Callable[..., Any]) -> bool:
    """Whether the function, or what a `partial` holds, is marked with `whole_responses`."""
    return bool(getattr(getattr(function, "func", function), "whole_responses", False))


def ppo(rows: PolicyRows, *, clip_low: float, clip_high: float, dual_clip: float | None = None) -> RowLosses:
    """-min(ratio A, clamp(ratio, 1 - clip_low, 1 + clip_high) A), PPO's clipped surrogate (arXiv 1707.06347).

    dual_clip: c > 1 bounds the loss of a row with a negative advantage by -c A (arXiv 1912.09729).
    """
    return _clipped(rows.log_ratio.exp(), rows.advantages, clip_low, clip_high, dual_clip)


@whole_responses
def gspo(rows: PolicyRows, *, clip_low: float, clip_high: float) -> RowLosses:
    """PPO's clip on the ratio of whole responses, s = exp(mean over its tokens of log ratio) (GSPO, arXiv 2507.18071).

    Each row carries s with the gradient of its own log-prob; with `loss_aggregation: sequence_mean_token_mean` the sum
    is the paper's objective. Its clips are small, 3e-4 and 4e-4 in the paper.
    """
    mean = rows.response_mean(rows.logprobs - rows.old_logprobs)
    bounded = mean.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return _clipped(
        (bounded + _zero_with_gradient(rows.logprobs)).exp(), rows.advantages, clip_low, clip_high
    )


@whole_responses
def gmpo(rows: PolicyRows, *, clip_low: float, clip_high: float) -> RowLosses:
    """-A times the geometric mean over a response's tokens of ratios that are clipped one by one, in the direction in
    which the advantage pushes them (GMPO, arXiv 2507.20673).

    With `loss_aggregation: sequence_mean_token_mean` the sum is the paper's objective; its bounds, e^-0.4 and e^0.4,
    are clip_low 0.33 and clip_high 0.49.
    """
    log_ratio = rows.log_ratio
    rising, falling = rows.advantages > 0, rows.advantages < 0
    clipped = (rising & (log_ratio > math.log1p(clip_high))) | (falling & (log_ratio < math.log1p(-clip_low)))
    bound = _where(rising, math.log1p(clip_high), math.log1p(-clip_low), log_ratio)
    kept = torch.where(clipped, bound, log_ratio)
    geometric = rows.response_mean(kept).exp()
    return RowLosses(-rows.advantages * geometric * _zero_with_gradient(kept).exp(), clipped)


def cispo(rows: PolicyRows, *, clip_low: float, clip_high: float) -> RowLosses:
    """-clamp(ratio, 1 - clip_low, 1 + clip_high) A log pi, the clamped ratio without gradient, so that no token loses
    its own (CISPO, MiniMax-M1, arXiv 2506.13585)."""
    ratio = rows.log_ratio.detach().exp()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return RowLosses(-weight * rows.advantages * rows.logprobs, weight != ratio)


def sapo(rows: PolicyRows, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> RowLosses:
    """-A (4 / tau) sigmoid(tau (ratio - 1)): a soft gate in place of the clip (SAPO, arXiv 2511.20347).

    tau_positive, tau_negative: its temperature where the advantage is positive, and where it is not.
    """
    ratio = rows.log_ratio.exp()
    tau = _where(rows.advantages > 0, tau_positive, tau_negative, ratio)
    gate = torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau)
    return RowLosses(-rows.advantages * gate, torch.zeros_like(ratio, dtype=torch.bool))


# `policy.loss`: name -> the loss of rows; keyword arguments are settings of `policy` and its `loss_options`.
POLICY_LOSSES: dict[str, Callable[..., RowLosses]] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "gmpo": gmpo,
    "sapo": sapo,
}


def _clipped(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> RowLosses:
    if not 0.0 <= clip_low <= 1.0 or not clip_high >= 0.0:
        raise ValueError(
            f"policy.clip_low is {clip_low} and policy.clip_high is {clip_high}; "
            "expected clip_low from 0 to 1 and clip_high of 0 or more"
        )
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"policy.dual_clip is {dual_clip}; expected a number above 1, or null for none")
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    is_clipped = clipped > plain
    loss = torch.where(is_clipped, clipped, plain)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > bound)
        loss = torch.where(beyond, bound, loss)
        is_clipped = is_clipped | beyond
    return RowLosses(loss, is_clipped)


def _where(chosen: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    """`one` where chosen and `other` elsewhere, in the dtype of `like`."""
    return torch.full_like(like, other).masked_fill(chosen, one)


def _zero_with_gradient(x: Tensor) -> Tensor:
    """0 with the gradient of x."""
    return x - x.detach()
