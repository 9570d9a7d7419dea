"""The log-prob op in plain torch: exact, deterministic, tiled so that the logits never exist at once.

Per row, with z the scaled logits, M their maximum, S = sum exp(z - M) and T = sum exp(z - M) (z - M):

    logprob = (z_label - M) - log S          entropy = log S - T / S

Summing p (z - M) instead of p z keeps the entropy exact for logits far from 0. Tiles over the vocabulary and
tensor-parallel shards are merged by moving each one's sums to the common maximum. The backward recomputes a
tile's logits and writes, with p = exp(z - lse), the entropy E, and g and e the gradients of logprob and E,

    dz_j = g [j = label] - p_j (g + e (log p_j + E))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_laser.ops.collectives import (
    gather_rows,
    group_size,
    reduce_max,
    reduce_sum_,
    scatter_sum_rows,
)
from megatron_laser.ops.labels import IGNORE_LABEL
from megatron_laser.ops.results import LogProbs
from megatron_laser.ops.tiles import (
    Shard,
    accumulation_dtype,
    add_mm_,
    has_label,
    local_labels,
    mm,
    mm_operand,
    row_part,
    slices,
    tile_logits,
    tile_shape,
    vocabulary_shard,
)

# Memory for one tile of logits; the op holds at most two, and on CUDA a half-precision copy of one.
LOGITS_TILE_BYTES = 64 * 2**20
# exp of it is 0 in float32 and float64, and unlike -inf it may be multiplied with a sum that is 0.
_SHIFT_FLOOR = -1e4


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    inv_temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    with_entropy: bool = False,
    tile_bytes: int = LOGITS_TILE_BYTES,
) -> LogProbs:
    """`megatron_laser.ops.linear_logprob` for checked arguments; `tile_bytes` bounds one tile of logits."""
    if isinstance(inv_temperature, torch.Tensor):
        inv_temperature = inv_temperature.to(accumulation_dtype(hidden))
    options = _Options(
        vocabulary_shard(weight, vocab_size, tp_group), tp_group, sequence_parallel, with_entropy, tile_bytes
    )
    return LogProbs(*_LinearLogProb.apply(hidden, weight, labels, inv_temperature, options))


def few_row_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    tile_bytes: int = LOGITS_TILE_BYTES,
) -> torch.Tensor:
    """`megatron_laser.ops.few_row_logprob` for checked arguments."""
    options = _Options(vocabulary_shard(weight, vocab_size, tp_group), tp_group, False, False, tile_bytes)
    return _forward(hidden, weight, labels, 1.0, options)[0]


@dataclass(frozen=True)
class _Options:
    shard: Shard
    tp_group: dist.ProcessGroup | None
    sequence_parallel: bool
    with_entropy: bool
    tile_bytes: int


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: float | torch.Tensor,
        options: _Options,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = gather_rows(hidden, options.tp_group) if options.sequence_parallel else hidden
        logprobs, entropy, lse = _forward(rows, weight, labels, inv_temperature, options)
        # The shard is kept, not the gathered rows: the backward gathers again.
        ctx.save_for_backward(hidden, weight, labels, lse, entropy)
        ctx.inv_temperature, ctx.options = inv_temperature, options
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, lse, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows = gather_rows(hidden, options.tp_group) if options.sequence_parallel else hidden
        known = has_label(labels, options.shard)
        grad_logprobs, grad_entropy = (None if grad is None else grad.where(known, 0) for grad in grads)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(lse)
        tiles = _GradientTiles(
            labels, ctx.inv_temperature, lse, entropy, grad_logprobs, grad_entropy, options.shard
        )
        grad_rows, grad_weight = tiles.run(rows, weight, options.tile_bytes, need_hidden, need_weight)
        if grad_rows is not None:
            reduce = scatter_sum_rows if options.sequence_parallel else reduce_sum_
            grad_rows = reduce(grad_rows, options.tp_group).to(hidden.dtype)
        return grad_rows, grad_weight, None, None, None


class _Statistics(NamedTuple):
    """Per row, over some columns: M, S, z_label (0 where the label is elsewhere) and, for the entropy, T."""

    maximum: torch.Tensor
    total: torch.Tensor
    label_logit: torch.Tensor
    moment: torch.Tensor | None

    def moved_to(self, maximum: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(S, z_label[, T]) relative to a maximum that is at least this one's; these add up over shards."""
        shift = (self.maximum - maximum).clamp_(min=_SHIFT_FLOOR)
        scale = shift.exp()
        if self.moment is None:
            return self.total * scale, self.label_logit
        return self.total * scale, self.label_logit, (self.moment + shift * self.total) * scale


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    inv_temperature: float | torch.Tensor,
    options: _Options,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(logprobs, entropy or None, lse), each [rows] and the same on every rank of the group."""
    maximum, total, label_logit, moment = _reduced(
        _local_statistics(hidden, weight, labels, inv_temperature, options), options.tp_group
    )
    log_total = total.log()
    known = has_label(labels, options.shard)
    # Without a label: 0. With a label that no column has: NaN, so that it cannot go unnoticed.
    other = torch.zeros_like(total).masked_fill_(~known & (labels != IGNORE_LABEL), math.nan)
    logprobs = torch.where(known, label_logit - maximum - log_total, other)
    entropy = None if moment is None else torch.where(known, log_total - moment / total, 0)
    return logprobs, entropy, maximum + log_total


def _reduced(local: _Statistics, group: dist.ProcessGroup | None) -> _Statistics:
    """One maximum and one sum over the group, for all rows together."""
    if group_size(group) == 1 or not local.total.numel():
        return local
    maximum = reduce_max(local.maximum, group)
    sums = reduce_sum_(torch.stack(local.moved_to(maximum)), group)
    return _Statistics(maximum, sums[0], sums[1], None if local.moment is None else sums[2])


def _local_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    inv_temperature: float | torch.Tensor,
    options: _Options,
) -> _Statistics:
    shard, rows = options.shard, hidden.shape[0]
    dtype = accumulation_dtype(hidden)
    if shard.columns == 0:
        zeros = torch.zeros(rows, dtype=dtype, device=hidden.device)
        return _Statistics(zeros - math.inf, zeros, zeros, zeros if options.with_entropy else None)
    row_block, column_block = tile_shape(rows, shard.columns, dtype.itemsize, options.tile_bytes)
    blocks = []
    for block in slices(rows, row_block):
        merged: _Statistics | None = None
        operand = mm_operand(hidden[block])
        for columns in slices(shard.columns, column_block):
            z = tile_logits(operand, mm_operand(weight[columns]), row_part(inv_temperature, block))
            label, owned = local_labels(labels[block], shard.first + columns.start, z.shape[1])
            tile = _tile_statistics(z, label, owned, options.with_entropy)
            if merged is None:
                merged = tile
            else:
                maximum = torch.maximum(merged.maximum, tile.maximum)
                pairs = zip(merged.moved_to(maximum), tile.moved_to(maximum))
                total, label_logit, *moment = (one + other for one, other in pairs)
                merged = _Statistics(maximum, total, label_logit, *(moment or [None]))
        assert merged is not None
        blocks.append(merged)
    if len(blocks) == 1:
        return blocks[0]
    return _Statistics(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks)))


def _tile_statistics(
    z: torch.Tensor, label: torch.Tensor, owned: torch.Tensor, with_entropy: bool
) -> _Statistics:
    """Statistics of one tile of scaled logits [rows, columns], which it overwrites."""
    label_logit = z.gather(1, label).squeeze(1).where(owned, 0)
    maximum = z.amax(1)
    z.sub_(maximum.unsqueeze(1))
    if not with_entropy:
        return _Statistics(maximum, z.exp_().sum(1), label_logit, None)
    p = z.exp()
    return _Statistics(maximum, p.sum(1), label_logit, z.mul_(p).sum(1))


@dataclass(frozen=True)
class _GradientTiles:
    """The backward: what each tile of logits needs of its rows. Tensors are [rows]; grads 0 without label."""

    labels: torch.Tensor
    inv_temperature: float | torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None
    grad_logprobs: torch.Tensor
    grad_entropy: torch.Tensor | None
    shard: Shard

    def run(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        tile_bytes: int,
        need_hidden: bool,
        need_weight: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(dX [rows, H] of this shard's columns in the accumulation dtype, dW in the dtype of `weight`).

        Vocabulary outside, rows inside: each slice of dW is summed in float32 and written once, so no float32
        copy of all of dW is needed.
        """
        dtype, rows = accumulation_dtype(hidden), hidden.shape[0]
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        if self.shard.columns == 0 or rows == 0:
            return grad_hidden, grad_weight
        row_block, column_block = tile_shape(rows, self.shard.columns, dtype.itemsize, tile_bytes)
        for columns in slices(self.shard.columns, column_block):
            weight_operand = mm_operand(weight[columns])
            weight_sum: torch.Tensor | None = None
            for block in slices(rows, row_block):
                operand = mm_operand(hidden[block])
                dz = self._grad_logits(operand, weight_operand, block, columns.start).to(operand.dtype)
                if grad_hidden is not None:
                    add_mm_(grad_hidden[block], dz, weight_operand)
                if grad_weight is not None:
                    if weight_sum is None:
                        weight_sum = mm(dz.t(), operand)
                    else:
                        add_mm_(weight_sum, dz.t(), operand)
            if grad_weight is not None:
                grad_weight[columns] = weight_sum
        return grad_hidden, grad_weight

    def _grad_logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, block: slice, first_column: int
    ) -> torch.Tensor:
        """Gradient of one tile's unscaled logits [rows, columns], in the accumulation dtype."""
        inv_temperature = row_part(self.inv_temperature, block)
        grad = self.grad_logprobs[block] * inv_temperature
        log_p = tile_logits(hidden, weight, inv_temperature).sub_(self.lse[block].unsqueeze(1))
        if self.grad_entropy is None or self.entropy is None:
            dz = log_p.exp_().mul_(grad.neg().unsqueeze(1))
        else:
            grad_entropy = self.grad_entropy[block] * inv_temperature
            p = log_p.exp()
            constant = grad + grad_entropy * self.entropy[block]
            dz = log_p.mul_(grad_entropy.unsqueeze(1)).add_(constant.unsqueeze(1)).mul_(p).neg_()
        label, owned = local_labels(self.labels[block], self.shard.first + first_column, dz.shape[1])
        return dz.scatter_add_(1, label, grad.where(owned, 0).unsqueeze(1))
