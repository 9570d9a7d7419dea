"""Which tokens the engine sampled from too different a policy to learn from."""

from __future__ import annotations

import math

from torch import Tensor

from megatron_laser.algorithms.numerics import at_least_float32


def importance_outside(old_logprobs: Tensor, rollout_logprobs: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Rows whose ratio pi_old / pi_rollout is outside [low, high], or not a number.

    Masked importance sampling: where `importance_weights` caps a ratio, this leaves the token out.

    Args:
        old_logprobs: [rows], the trainer's, of the weights that generated the batch.
        rollout_logprobs: [rows], the engine's.
        bounds: (low, high) with 0 <= low < high, both inside.

    Returns:
        [rows] bool.
    """
    if old_logprobs.shape != rollout_logprobs.shape or old_logprobs.dim() != 1:
        raise ValueError(
            f"old_logprobs {tuple(old_logprobs.shape)} and rollout_logprobs {tuple(rollout_logprobs.shape)} "
            "must have one shape [rows]: pass one entry per response token"
        )
    low, high = bounds
    if not 0.0 <= low < high:
        raise ValueError(f"policy.importance_mask is [{low:g}, {high:g}]; expected 0 <= low < high")
    log_ratio = at_least_float32(old_logprobs.detach()) - rollout_logprobs.detach()
    lowest = math.log(low) if low > 0 else -math.inf
    # Compared this way round, NaN is outside.
    return ~((log_ratio >= lowest) & (log_ratio <= math.log(high)))
