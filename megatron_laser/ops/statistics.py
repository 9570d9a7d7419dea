"""Statistics of rows of logits: over some columns, merged over tiles and over the tensor-parallel group.

Per row, with z the scaled logits, M their maximum, S = sum exp(z - M) and T = sum exp(z - M) (z - M):

    logprob = (z_label - M) - log S          entropy = log S - T / S

Summing p (z - M) instead of p z keeps the entropy exact for logits far from 0. Tiles over the vocabulary and
tensor-parallel shards are merged by moving each one's sums to the common maximum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_laser.ops.collectives import all_gather, group_size
from megatron_laser.ops.tiles import Shard, has_label
from megatron_laser.ops.types import IGNORE_LABEL

# exp of it is 0 in float32 and float64, and unlike -inf it may be multiplied with a sum that is 0.
_SHIFT_FLOOR = -1e4


class Statistics(NamedTuple):
    """Per row, over some columns: M, S, z_label (0 where the label is elsewhere) and, for the entropy, T."""

    maximum: torch.Tensor
    total: torch.Tensor
    label_logit: torch.Tensor
    moment: torch.Tensor | None

    def moved_to(self, maximum: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(S, z_label[, T]) relative to a maximum that is at least this one's; these add up over shards."""
        # -inf - -inf is NaN: a maximum of -inf (no column at all) is moved to the least number there is.
        least = torch.finfo(maximum.dtype).min
        shift = (self.maximum - maximum.clamp(min=least)).clamp_(min=_SHIFT_FLOOR)
        scale = shift.exp()
        if self.moment is None:
            return self.total * scale, self.label_logit
        return self.total * scale, self.label_logit, (self.moment + shift * self.total) * scale


def no_columns(rows: int, dtype: torch.dtype, device: torch.device, with_entropy: bool) -> Statistics:
    """Statistics of a shard that is nothing but padding."""
    zeros = torch.zeros(rows, dtype=dtype, device=device)
    return Statistics(zeros - math.inf, zeros, zeros, zeros if with_entropy else None)


def merged(parts: torch.Tensor) -> Statistics:
    """Statistics of several sets of columns as one: parts [sets, 3 or 4, rows] in the order of `Statistics`."""
    maximum, total, label_logit, *moment = parts.unbind(1)
    together = maximum.amax(0)
    moved = Statistics(maximum, total, label_logit, moment[0] if moment else None).moved_to(together)
    total, label_logit, *moment = torch.stack(moved).sum(1)
    return Statistics(together, total, label_logit, moment[0] if moment else None)


def reduced(local: Statistics, group: dist.ProcessGroup | None) -> Statistics:
    """Over the group, for all rows together: one all-gather, merged in rank order.

    Every rank merges the same numbers in the same order, so the result is the same on all of them bit by bit.
    """
    if group_size(group) == 1 or not local.total.numel():
        return local
    return merged(all_gather(torch.stack([field for field in local if field is not None]), group))


def finish(
    statistics: Statistics, labels: torch.Tensor, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(logprobs, entropy or None, lse), each [rows], from the statistics over the whole vocabulary."""
    maximum, total, label_logit, moment = statistics
    log_total = total.log()
    known = has_label(labels, shard)
    # Without a label: 0. With a label that no column has: NaN, so that it cannot go unnoticed.
    other = torch.zeros_like(total).masked_fill_(~known & (labels != IGNORE_LABEL), math.nan)
    logprobs = torch.where(known, label_logit - maximum - log_total, other)
    entropy = None if moment is None else torch.where(known, log_total - moment / total, 0)
    return logprobs, entropy, maximum + log_total
