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

    def at(self, block: slice) -> Statistics:
        """Views of a block of rows."""
        return Statistics(*(None if field is None else field[block] for field in self))


class Finished(NamedTuple):
    """Over the whole vocabulary, [rows] each; the entropy only where its moment is known."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor


def no_columns(rows: int, dtype: torch.dtype, device: torch.device, with_entropy: bool) -> Statistics:
    """Statistics before the first column, which may be updated in place, and of a shard that is only padding."""
    zeros = torch.zeros(4 if with_entropy else 3, rows, dtype=dtype, device=device)
    return Statistics(zeros[0].fill_(-math.inf), zeros[1], zeros[2], zeros[3] if with_entropy else None)


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


def finish(statistics: Statistics, labels: torch.Tensor, shard: Shard) -> Finished:
    """Of the labels [rows], from the statistics over the whole vocabulary."""
    maximum, total, label_logit, moment = statistics
    log_total = total.log()
    known = has_label(labels, shard)
    # Without a label: 0. With a label that no column has: NaN, so that it cannot go unnoticed.
    other = torch.zeros_like(total).masked_fill_(~known & (labels != IGNORE_LABEL), math.nan)
    logprobs = torch.where(known, label_logit - maximum - log_total, other)
    entropy = None if moment is None else torch.where(known, log_total - moment / total, 0)
    return Finished(logprobs, entropy, maximum + log_total)
