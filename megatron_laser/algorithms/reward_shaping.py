"""Terms for length, added to the rewards that advantages are made of. The verifier's labels stay as they are.

All functions take and return [samples] in float64; samples may come in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalties(
    lengths: Tensor, *, max_new_tokens: int, buffer: int, penalty: float, truncated: Tensor
) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), times `penalty`: 0 to -penalty.

    0 up to max_new_tokens - buffer tokens, then falling by penalty / buffer a token; -penalty for a response that was
    cut off.

    Args:
        lengths: [samples] tokens of the responses, whoever wrote them. truncated: [samples] bool.
        buffer: 1 to max_new_tokens. penalty: >= 0.
    """
    if not 1 <= buffer <= max_new_tokens:
        raise ValueError(f"policy.overlong_buffer is {buffer}; expected 1 to {max_new_tokens} tokens")
    over = (lengths.double() - (max_new_tokens - buffer)).clamp(min=0.0) / buffer
    return -penalty * torch.where(truncated.bool(), 1.0, over.clamp(max=1.0))


def length_penalties(lengths: Tensor, rewards: Tensor, group_ids: Tensor, *, weight: float) -> Tensor:
    """Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3), times `weight`.

    lambda = 1/2 - (length - shortest) / (longest - shortest) over the sample's group: right responses get it, wrong
    ones min(0, lambda). A group of equal lengths gets 0.

    Args:
        lengths, rewards: [samples], sampled tokens; right is a reward above 0.5. group_ids: [samples] int64.
    """
    result = torch.zeros_like(lengths, dtype=torch.float64)
    for group in group_ids.unique():
        members = group_ids == group
        own = lengths[members].double()
        span = own.max() - own.min()
        if span > 0:
            share = 0.5 - (own - own.min()) / span
            result[members] = weight * torch.where(rewards[members] > 0.5, share, share.clamp(max=0.0))
    return result
