"""The log-prob op in plain torch: exact, deterministic, tiled so that the logits never exist at once."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_laser.ops.autograd import HiddenGradient, Problem, Upstream, apply
from megatron_laser.ops.few_rows import without_gradient
from megatron_laser.ops.statistics import Statistics, no_columns
from megatron_laser.ops.tiles import (
    accumulation_dtype,
    local_labels,
    mm_operand,
    row_part,
    slices,
    tile_logits,
    tile_shape,
)
from megatron_laser.ops.types import LogProbs
from megatron_laser.ops.weight_gradient import WeightGradient

# Memory for one tile of logits; the op holds at most two, and on CUDA a half-precision copy of one.
LOGITS_TILE_BYTES = 64 * 2**20


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
    return apply(
        TorchEngine(tile_bytes),
        hidden,
        weight,
        labels,
        inv_temperature=inv_temperature,
        vocab_size=vocab_size,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        with_entropy=with_entropy,
    )


def few_row_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    tile_bytes: int = LOGITS_TILE_BYTES,
) -> torch.Tensor:
    """`megatron_laser.ops.few_row_logprob` for checked arguments."""
    return without_gradient(
        TorchEngine(tile_bytes),
        hidden,
        weight,
        labels,
        rows=rows,
        vocab_size=vocab_size,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
    )


class TorchEngine:
    """Tiles of logits in plain torch; `tile_bytes` bounds one of them."""

    def __init__(self, tile_bytes: int = LOGITS_TILE_BYTES) -> None:
        self._tile_bytes = tile_bytes

    def statistics(self, problem: Problem, *, for_backward: bool) -> tuple[Statistics, None]:
        """See `Engine`; nothing is kept for the backward."""
        hidden, shard = problem.rows.all(), problem.shard
        rows, dtype = hidden.shape[0], accumulation_dtype(hidden)
        if shard.columns == 0:
            return no_columns(rows, dtype, hidden.device, problem.with_entropy), None
        row_block, column_block = tile_shape(rows, shard.columns, dtype.itemsize, self._tile_bytes)
        blocks = []
        for block in slices(rows, row_block):
            merged: Statistics | None = None
            operand = mm_operand(hidden[block])
            for columns in slices(shard.columns, column_block):
                z = tile_logits(
                    operand, mm_operand(problem.weight[columns]), row_part(problem.inv_temperature, block)
                )
                label, owned = local_labels(problem.labels[block], shard.first + columns.start, z.shape[1])
                tile = _tile_statistics(z, label, owned, problem.with_entropy)
                if merged is None:
                    merged = tile
                else:
                    maximum = torch.maximum(merged.maximum, tile.maximum)
                    pairs = zip(merged.moved_to(maximum), tile.moved_to(maximum))
                    total, label_logit, *moment = (one + other for one, other in pairs)
                    merged = Statistics(maximum, total, label_logit, *(moment or [None]))
            assert merged is not None
            blocks.append(merged)
        if len(blocks) == 1:
            return blocks[0], None
        return Statistics(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks))), None

    def gradients(
        self,
        problem: Problem,
        upstream: Upstream,
        kept: None,
        hidden: HiddenGradient | None,
        weight: WeightGradient | None,
    ) -> None:
        """See `Engine`.

        Vocabulary outside, rows inside: each slice of dW is summed in float32 and written once, so no float32
        copy of all of dW is needed.
        """
        inputs = problem.rows.all()
        rows, columns_all = inputs.shape[0], problem.shard.columns
        dtype = accumulation_dtype(inputs)
        row_block, column_block = tile_shape(rows, columns_all, dtype.itemsize, self._tile_bytes)
        for columns in slices(columns_all, column_block):
            weight_operand = mm_operand(problem.weight[columns])
            for block in slices(rows, row_block):
                operand = mm_operand(inputs[block])
                dz = _grad_logits(problem, upstream, operand, weight_operand, block, columns.start)
                dz = dz.to(operand.dtype)
                if hidden is not None:
                    hidden.add(block, dz, weight_operand)
                    if columns.stop == columns_all and block.stop == rows:
                        hidden.complete()
                if weight is not None:
                    weight.add(columns, dz, operand, only=row_block >= rows)
            if weight is not None:
                weight.close(columns)


def _tile_statistics(
    z: torch.Tensor, label: torch.Tensor, owned: torch.Tensor, with_entropy: bool
) -> Statistics:
    """Statistics of one tile of scaled logits [rows, columns], which it overwrites."""
    label_logit = z.gather(1, label).squeeze(1).where(owned, 0)
    maximum = z.amax(1)
    z.sub_(maximum.unsqueeze(1))
    if not with_entropy:
        return Statistics(maximum, z.exp_().sum(1), label_logit, None)
    p = z.exp()
    return Statistics(maximum, p.sum(1), label_logit, z.mul_(p).sum(1))


def _grad_logits(
    problem: Problem,
    upstream: Upstream,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    block: slice,
    first_column: int,
) -> torch.Tensor:
    """Gradient of one tile's unscaled logits [rows, columns], in the accumulation dtype."""
    inv_temperature = row_part(problem.inv_temperature, block)
    grad = upstream.grad_logprobs[block] * inv_temperature
    log_p = tile_logits(hidden, weight, inv_temperature).sub_(upstream.lse[block].unsqueeze(1))
    if upstream.grad_entropy is None or upstream.entropy is None:
        dz = log_p.exp_().mul_(grad.neg().unsqueeze(1))
    else:
        grad_entropy = upstream.grad_entropy[block] * inv_temperature
        p = log_p.exp()
        constant = grad + grad_entropy * upstream.entropy[block]
        dz = log_p.mul_(grad_entropy.unsqueeze(1)).add_(constant.unsqueeze(1)).mul_(p).neg_()
    label, owned = local_labels(problem.labels[block], problem.shard.first + first_column, dz.shape[1])
    return dz.scatter_add_(1, label, grad.where(owned, 0).unsqueeze(1))
