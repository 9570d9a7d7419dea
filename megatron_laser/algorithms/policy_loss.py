"""A policy loss on flat rows, and the weights that make its sum the chosen aggregation.

A *row* is one response token. Weights carry the global counts, so the sum over any cut of the rows, over
micro-batches and ranks, is the loss of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_laser.algorithms.numerics import at_least_float32
from megatron_laser.algorithms.objectives import PolicyRows, RowLosses, ppo

LossAggregation = Literal[
    "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"
]

# What a token's importance ratio is taken of: itself, its response's product, or the geometric mean of that.
ImportanceLevel = Literal["token", "sequence", "geometric"]


class PolicyLoss(NamedTuple):
    """`loss` is the sum over rows of loss times weight, and alone has a gradient.

    `clipped` and `approx_kl` are plain float64 sums over rows, whatever the weights: divided by the number of rows of
    the batch they are token means, which say the same under every aggregation. They are computed when asked for.
    """

    loss: Tensor
    is_clipped: Tensor  # [rows] bool: a clip, dual clip included, replaced the plain objective
    log_ratio: Tensor  # [rows], log pi - log pi_old, bounded

    @property
    def clipped(self) -> Tensor:
        """How many rows are clipped."""
        return self.is_clipped.sum(dtype=torch.float64)

    @property
    def approx_kl(self) -> Tensor:
        """k3 estimate of KL(old || current), never negative."""
        return (torch.expm1(self.log_ratio) - self.log_ratio).sum(dtype=torch.float64)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (arXiv 1707.06347): -min(ratio * A, clamp(ratio, 1 - low, 1 + high) * A).

    With `old_logprobs=logprobs.detach()` (on-policy) the ratio is exactly 1, nothing is clipped and the
    gradient is that of the policy gradient, -A * grad log pi.

    Args:
        logprobs: [rows], of the policy that is trained. No rows give a zero that still has a gradient.
        old_logprobs: [rows], of the policy that the ratio is taken against; no gradient.
        advantages: [rows], each sample's advantage on all its rows; no gradient.
        weights: [rows], from `sequence_token_weights`; no gradient.
        clip_low, clip_high: the ratio stays within [1 - clip_low, 1 + clip_high].
        dual_clip: c > 1 bounds the loss of a row with a negative advantage by -c * A (arXiv 1912.09729).
        importance_weights: [rows], from `importance_weights`; they multiply the row's loss.

    Returns:
        Scalars, at least float32.
    """
    return weighted_policy_loss(
        partial(ppo, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip),
        logprobs,
        old_logprobs,
        advantages,
        weights,
        importance_weights=importance_weights,
    )


def weighted_policy_loss(
    objective: Callable[[PolicyRows], RowLosses | Tensor],
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    importance_weights: Tensor | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
) -> PolicyLoss:
    """The sum over rows of any `objective`'s loss times weight; arguments as in `policy_loss`.

    Args:
        objective: of `POLICY_LOSSES`, with its options; or a user's, which may return the losses [rows] alone.
        average: what `PolicyRows.response_mean` is.

    Raises:
        ValueError: shapes differ, or `objective` returned something else than one loss for each row.
    """
    _check_rows(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        weights=weights,
        importance_weights=importance_weights,
    )
    logprobs = at_least_float32(logprobs)
    row_weights = weights.detach().to(logprobs.dtype)
    if importance_weights is not None:
        loss_weights = row_weights * importance_weights.detach().to(logprobs.dtype)
    else:
        loss_weights = row_weights
    rows = PolicyRows(logprobs, old_logprobs.detach(), advantages.detach().to(logprobs.dtype), average)
    found = objective(rows)
    loss, clipped = found if isinstance(found, tuple) else (found, None)
    if not isinstance(loss, Tensor) or loss.shape != logprobs.shape:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"policy.loss returned {shape}; expected one loss for each of {len(logprobs)} rows")
    is_clipped = torch.zeros_like(logprobs, dtype=torch.bool) if clipped is None else clipped
    return PolicyLoss((loss_weights * loss).sum(), is_clipped, rows.log_ratio.detach())


def sequence_token_weights(
    response_lengths: Tensor,
    mode: LossAggregation,
    *,
    num_samples: int,
    num_tokens: int,
    max_new_tokens: int,
) -> Tensor:
    """The weight of each row of sample i, so that the weighted sum over the global batch is the aggregation.

    `token_mean` 1 / num_tokens; `sequence_mean_token_mean` 1 / (num_samples * length_i);
    `sequence_mean_token_sum` 1 / num_samples; `constant_length` 1 / (num_samples * max_new_tokens), which is
    Dr. GRPO's (arXiv 2503.20783).

    Args:
        response_lengths: [samples] of this rank, response tokens of each; 0 is fine (it has no rows).
        mode: `policy.loss_aggregation`.
        num_samples: samples in the global batch of the optimizer step, those of length 0 included.
        num_tokens: response tokens in that batch.
        max_new_tokens: `rollout.max_new_tokens`.

    Returns:
        [samples] float32.
    """
    if num_samples < response_lengths.numel():
        raise ValueError(
            f"num_samples is {num_samples} but {response_lengths.numel()} lengths were given; expected the "
            "count of the global batch (all ranks, all micro-batches)"
        )
    lengths = response_lengths.double()
    if mode == "token_mean":
        weights = torch.full_like(lengths, 1.0 / max(num_tokens, 1))
    elif mode == "sequence_mean_token_mean":
        weights = 1.0 / (max(num_samples, 1) * lengths.clamp(min=1.0))
    elif mode == "sequence_mean_token_sum":
        weights = torch.full_like(lengths, 1.0 / max(num_samples, 1))
    elif mode == "constant_length":
        if max_new_tokens < 1:
            raise ValueError(f"rollout.max_new_tokens is {max_new_tokens}; expected 1 or more")
        weights = torch.full_like(lengths, 1.0 / (max(num_samples, 1) * max_new_tokens))
    else:
        raise ValueError(
            f"policy.loss_aggregation is {mode!r}; expected token_mean, sequence_mean_token_mean, "
            "sequence_mean_token_sum or constant_length"
        )
    return weights.float()


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_rollout, cap) for each row: corrects for an engine that samples with other numerics.

    Truncated importance sampling; [rows], at least float32, without gradient.
    """
    return capped_importance(log_importance(old_logprobs, rollout_logprobs), cap)


def capped_importance(log_ratio: Tensor, cap: float) -> Tensor:
    """min(ratio, cap) [rows] of what `log_importance` gave."""
    if not cap > 0:
        raise ValueError(f"policy.importance_cap is {cap}; expected a positive number, or null for none")
    return log_ratio.clamp(max=math.log(cap)).exp()


def importance_outside(old_logprobs: Tensor, rollout_logprobs: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Rows whose ratio pi_old / pi_rollout is outside [low, high], or not a number; [rows] bool.

    Masked importance sampling: where `importance_weights` caps a ratio, this leaves the token out.
    """
    return outside_bounds(log_importance(old_logprobs, rollout_logprobs), bounds)


def outside_bounds(log_ratio: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Where the ratio of what `log_importance` gave is outside (low, high), or not a number; [rows] bool.

    bounds: 0 <= low < high, both inside.
    """
    low, high = bounds
    if not 0.0 <= low < high:
        raise ValueError(f"policy.importance_mask is [{low:g}, {high:g}]; expected 0 <= low < high")
    lowest = math.log(low) if low > 0 else -math.inf
    # Compared this way round, NaN is outside.
    return ~((log_ratio >= lowest) & (log_ratio <= math.log(high)))


def log_importance(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    level: ImportanceLevel = "token",
    average: Callable[[Tensor], Tensor] | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """log(pi_old / pi_rollout) of each row's token, or of its response; [rows], at least float32, without gradient.

    Args:
        old_logprobs: [rows], the trainer's, of the weights that generated the batch.
        rollout_logprobs: [rows], the engine's.
        level: "token", each token's own ratio; "sequence", the product over its response, which is unbiased and
            whose spread grows with length; "geometric", the geometric mean of that.
        average: for the other two, the mean over each row's response (`PolicyRows.response_mean`).
        lengths: for "sequence", [rows] tokens of each row's response.
    """
    if old_logprobs.shape != rollout_logprobs.shape or old_logprobs.dim() != 1:
        raise ValueError(
            f"old_logprobs {tuple(old_logprobs.shape)} and rollout_logprobs {tuple(rollout_logprobs.shape)} "
            "must have one shape [rows]: pass one entry per response token"
        )
    log_ratio = at_least_float32(old_logprobs.detach()) - rollout_logprobs.detach()
    if level == "token":
        return log_ratio
    if average is None or (level == "sequence" and lengths is None):
        raise ValueError(
            f"policy.importance_level {level!r} needs the means over responses, and their lengths"
        )
    mean = average(log_ratio)
    return mean if level == "geometric" or lengths is None else mean * lengths.to(mean.dtype)


def _check_rows(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(f"all of {shapes} must have one shape [rows]: pass one entry per response token")
