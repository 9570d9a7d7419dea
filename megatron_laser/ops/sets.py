"""Log-probs over a set of columns of each row: softmax over the tokens that were sampled from, with gradients.

Rows are worked on in chunks. The columns that are in any set of a chunk are picked out of the weight once and
multiplied with the chunk's rows, as one product; a row's other columns are then set to -inf. Since rows share members,
that is less than the vocabulary, and never more. Each rank of a tensor-parallel group does so for the members in its
shard, and statistics of rows are merged as those of the whole vocabulary are. The backward makes a chunk's logits
again: dX is one product, dW another, added to the picked columns, none of which is there twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_laser.ops.autograd import TokenGradient
from megatron_laser.ops.collectives import GatheredRows
from megatron_laser.ops.settings import settings
from megatron_laser.ops.statistics import Finished, Statistics, finish, no_columns, reduced
from megatron_laser.ops.tiles import Shard, accumulation_dtype, has_label, mm, mm_operand, vocabulary_shard
from megatron_laser.ops.weight_gradient import WeightGradient, main_grad_of

#: Most rows of a chunk: enough for products at full speed; the more rows, the more columns each is multiplied with.
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Sets:
    """Of each of n rows the columns of its set, as global ids, one row's after another's; a repeated one counts once.

    ids: [sum of counts] int64, on the rows' device. offsets: [n + 1] int64 on the CPU, where each row's begin.
    """

    ids: torch.Tensor
    offsets: torch.Tensor

    def of_rows(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of rows [first, last): the row [m], counted from `first`, and the id [m] of each member."""
        bounds = self.offsets[first : last + 1]
        rows = torch.repeat_interleave(torch.arange(last - first), bounds.diff())
        return rows.to(self.ids.device), self.ids[int(bounds[0]) : int(bounds[-1])]


@dataclass(frozen=True)
class Placement:
    """Where rows come from and dX goes to; see `linear_logprob`."""

    tp_group: dist.ProcessGroup | None
    sequence_parallel: bool
    own_rows: tuple[int, int] | None
    distinct_rows: bool


class _Chunk(NamedTuple):
    """Rows [rows.start, rows.stop) and the members of their sets in this rank's shard.

    columns: [U] of the shard, increasing. hidden: [rows, H], weight: [U, H], as `mm` takes them. logits: [rows, U]
    scaled, -inf where the column is not in the row's set. label: [rows, 1] place of the label among the columns, where
    `has_label` [rows]; else any.
    """

    rows: slice
    columns: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    logits: torch.Tensor
    label: torch.Tensor
    has_label: torch.Tensor


def row_chunks(offsets: list[int], columns: int, hidden_size: int, itemsize: int) -> list[slice]:
    """Rows of each chunk: no more than fit, with what is picked of the weight and its gradient, into a tile.

    A row is not cut: that much memory a single set takes in any case.
    """
    chunks, first, rows = [], 0, len(offsets) - 1
    while first < rows:
        last = min(rows, first + CHUNK_ROWS)

        def size(last: int, first: int = first) -> int:
            most = min(columns, offsets[last] - offsets[first])
            return (last - first + 2 * hidden_size) * most * itemsize

        while last - first > 1 and size(last) > settings().tile_bytes:
            last = first + (last - first) // 2
        chunks.append(slice(first, last))
        first = last
    return chunks


@dataclass(frozen=True)
class _Problem:
    """hidden [n, H] of all rows; the rest as `set_logprob` has it; inv_temperature [n] in the accumulation dtype."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    sets: Sets
    inv_temperature: torch.Tensor
    shard: Shard

    def chunks(self) -> Iterator[_Chunk]:
        """Those with a member in this rank's shard, in the order of rows."""
        shard, dtype = self.shard, accumulation_dtype(self.hidden)
        for rows in row_chunks(
            self.sets.offsets.tolist(), shard.columns, self.hidden.shape[1], dtype.itemsize
        ):
            row, ids = self.sets.of_rows(rows.start, rows.stop)
            local = ids - shard.first
            if shard.columns < shard.vocab_size:
                own = (local >= 0) & (local < shard.columns)
                row, local = row[own], local[own]
            if not len(local):
                continue
            columns, place = torch.unique(local, return_inverse=True)
            hidden = mm_operand(self.hidden[rows])
            weight = mm_operand(self.weight.index_select(0, columns))
            logits = mm(hidden, weight.t()).mul_(self.inv_temperature[rows].unsqueeze(1))
            outside = torch.ones_like(logits, dtype=torch.bool)
            outside[row, place] = False
            labels = self.labels[rows] - shard.first
            label = torch.searchsorted(columns, labels).clamp_(max=len(columns) - 1)
            yield _Chunk(
                rows,
                columns,
                hidden,
                weight,
                logits.masked_fill_(outside, -math.inf),
                label.unsqueeze(1),
                columns[label] == labels,
            )

    def statistics(self) -> Statistics:
        """Of this rank's members of each row."""
        dtype = accumulation_dtype(self.hidden)
        found = no_columns(len(self.labels), dtype, self.hidden.device, False)
        for chunk in self.chunks():
            maximum = chunk.logits.amax(1)
            # A row without a member here has a maximum of -inf: its sum is one of zeros.
            shifted = chunk.logits - maximum.clamp(min=torch.finfo(dtype).min).unsqueeze(1)
            found.maximum[chunk.rows] = maximum
            found.total[chunk.rows] = shifted.exp_().sum(1)
            label = chunk.logits.gather(1, chunk.label).squeeze(1)
            found.label_logit[chunk.rows] = label.where(chunk.has_label, 0)
        return found

    def gradients(
        self,
        found: Finished,
        upstream: torch.Tensor,
        hidden: torch.Tensor | None,
        weight: WeightGradient | None,
    ) -> None:
        """Add this shard's part of dX to `hidden` [n, H] and of dW; `upstream` [n]: the log-probs' gradient."""
        scaled = upstream * self.inv_temperature
        for chunk in self.chunks():
            rows = chunk.rows
            dz = chunk.logits.sub_(found.lse[rows].unsqueeze(1)).exp_().mul_(-scaled[rows].unsqueeze(1))
            # 1 - p of a rounded p would be noise for a confident token.
            own = -found.logprobs[rows].expm1() * scaled[rows]
            old = dz.gather(1, chunk.label).squeeze(1)
            dz.scatter_(1, chunk.label, own.where(chunk.has_label, old).unsqueeze(1))
            operand = dz.to(chunk.hidden.dtype)
            if hidden is not None:
                hidden[rows] = mm(operand, chunk.weight)
            if weight is not None:
                weight.add_rows(chunk.columns, mm(operand.t(), chunk.hidden))


class SetLogProb(torch.autograd.Function):
    """hidden, weight -> log-probs [n]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor | None,
        inv_temperature: torch.Tensor,
        sets: Sets,
        shard: Shard,
        placement: Placement,
    ) -> torch.Tensor:
        """See the class."""
        gathered = _gather(hidden, rows, placement)
        problem = _Problem(gathered.all(), weight, labels, sets, inv_temperature, shard)
        found = finish(reduced(problem.statistics(), placement.tp_group), labels, shard)
        # The shard is kept, not the gathered rows: the backward gathers again.
        ctx.save_for_backward(hidden, weight, labels, rows, inv_temperature, found.logprobs, found.lse)
        ctx.sets, ctx.shard, ctx.placement = sets, shard, placement
        # The parameter's own attributes: what save_for_backward gives back need not be the same object.
        ctx.parameter = weight
        return found.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """See the class."""
        hidden, weight, labels, rows, inv_temperature, logprobs, lse = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        gathered = _gather(hidden, rows, ctx.placement)
        problem = _Problem(gathered.all(), weight, labels, ctx.sets, inv_temperature, ctx.shard)
        tokens = total = grad_weight = None
        if need_hidden:
            tokens = TokenGradient(gathered, ctx.placement)
            total = problem.hidden.new_zeros(problem.hidden.shape, dtype=accumulation_dtype(hidden))
        if need_weight:
            grad_weight = WeightGradient(
                weight, main_grad_of(ctx.parameter), ctx.shard.columns, several_passes=True
            )
        upstream = upstream.where(has_label(labels, ctx.shard), 0)
        problem.gradients(Finished(logprobs, None, lse), upstream, total, grad_weight)
        if tokens is not None and total is not None:
            tokens.start(total, None)
        return (
            None if tokens is None else tokens.result(),
            None if grad_weight is None else grad_weight.for_autograd(ctx.parameter),
            *[None] * 6,
        )


def _gather(hidden: torch.Tensor, rows: torch.Tensor | None, placement: Placement) -> GatheredRows:
    group = placement.tp_group if placement.sequence_parallel else None
    return GatheredRows(hidden, group, rows, placement.own_rows)


def apply(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    sets: Sets,
    *,
    rows: torch.Tensor | None,
    inv_temperature: float | torch.Tensor,
    vocab_size: int | None,
    placement: Placement,
) -> torch.Tensor:
    """`megatron_laser.ops.set_logprob` for checked arguments."""
    dtype = accumulation_dtype(hidden)
    scale = torch.as_tensor(inv_temperature, dtype=dtype, device=hidden.device).expand(len(labels))
    shard = vocabulary_shard(weight, vocab_size, placement.tp_group)
    return SetLogProb.apply(hidden, weight, labels.contiguous(), rows, scale, sets, shard, placement)


def check_sets(sets: Sets, labels: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError for sets that are not those of `labels` [n]; members are looked at on a CPU only."""
    ids, offsets = sets.ids, sets.offsets
    if ids.dim() != 1 or ids.dtype != torch.int64 or ids.device != labels.device:
        raise ValueError(
            f"sets.ids is {tuple(ids.shape)} {ids.dtype} on {ids.device}: expected [members] torch.int64 on "
            f"{labels.device}."
        )
    fits = offsets.shape == (len(labels) + 1,) and offsets.dtype == torch.int64 and not offsets.is_cuda
    if not fits or int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"sets.offsets is {tuple(offsets.shape)} {offsets.dtype} on {offsets.device}: expected "
            f"[{len(labels) + 1}] torch.int64 on the CPU, from 0 to the {len(ids)} members, none below the one before."
        )
    if ids.is_cuda or not len(labels):
        return
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"sets.ids are {int(ids.min())} to {int(ids.max())}: expected 0 to {vocab_size - 1}."
        )
    row, _ = sets.of_rows(0, len(labels))
    inside = torch.zeros(len(labels), dtype=torch.bool).index_put_(
        (row[ids == labels[row]],), torch.tensor(True)
    )
    outside = (~inside & (labels >= 0)).nonzero()
    if len(outside):
        index = int(outside[0])
        raise ValueError(f"labels[{index}] = {int(labels[index])} is not in the set of its row.")
