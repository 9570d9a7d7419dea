"""Tiles of logits from a matrix product, reduced and differentiated by an implementation's own tile functions.

Per slice of the vocabulary the forward costs one product and one read of its result, which may leave probabilities for
the backward. From those the backward takes dX and its slice of dW, two products; where there are none it makes the
logits again and turns them into their gradient first. Every slice of dW has one writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_laser.ops.autograd import HiddenGradient, Problem, Upstream
from megatron_laser.ops.device import multiprocessors
from megatron_laser.ops.kept import Kept, put_labels_
from megatron_laser.ops.memory import shrink_keep_budget
from megatron_laser.ops.slices import slice_widths
from megatron_laser.ops.statistics import Statistics, no_columns
from megatron_laser.ops.tiles import accumulation_dtype, mm, mm_operand, padded
from megatron_laser.ops.weight_gradient import WeightGradient


@dataclass(frozen=True)
class TilePlan:
    """How [rows, columns] is cut: blocks of rows inside slices of columns, whose widths are given."""

    rows: int
    columns: int
    row_block: int
    widths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        rows: int,
        columns: int,
        hidden_size: int,
        *,
        itemsize: int,
        tile_bytes: int,
        min_columns: int,
        multiprocessors: int,
    ) -> TilePlan:
        """All rows of a slice if `min_columns` of them fit into `tile_bytes`, else blocks of rows too."""
        elements = max(1, tile_bytes // itemsize)
        narrow = min(columns, min_columns)
        row_block = rows
        if rows * narrow > elements:
            row_block = max(1, min(rows, elements // narrow))
        row_block = -(-rows // -(-rows // row_block))
        widest = max(1, elements // row_block)
        widths = slice_widths(
            *(row_block, hidden_size, columns),
            widest=widest if widest < 16 else widest // 16 * 16,  # see `padded`
            multiprocessors=multiprocessors,
        )
        return cls(rows, columns, row_block, tuple(widths))

    def column_slices(self, first: int = 0) -> Iterator[slice]:
        """Slices of the columns, counted from `first`."""
        for width in self.widths:
            yield slice(first, first + width)
            first += width

    def row_slices(self) -> Iterator[slice]:
        """Blocks of rows."""
        for start in range(0, self.rows, self.row_block):
            yield slice(start, min(start + self.row_block, self.rows))

    @property
    def tile_elements(self) -> int:
        """Elements of a buffer for one tile."""
        return self.row_block * padded(max(self.widths))

    @property
    def whole_rows(self) -> bool:
        """Whether one tile covers all rows."""
        return self.row_block >= self.rows


@dataclass(frozen=True)
class Keep:
    """Where a slice's P = exp(z - base) goes: values [rows, columns], base [rows], which the `first` slice writes."""

    values: torch.Tensor
    base: torch.Tensor
    first: bool


class TileFunctions(Protocol):
    """What an implementation does to one tile of logits."""

    def statistics(
        self,
        z: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: torch.Tensor,
        state: Statistics,
        first_column: int,
        keep: Keep | None,
    ) -> None:
        """Merge unscaled logits z [rows, columns], which may be overwritten, into `state`; write what is kept."""

    def gradient(
        self,
        z: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: torch.Tensor,
        upstream: Upstream,
        out: torch.Tensor,
        first_column: int,
        base: torch.Tensor | None,
    ) -> None:
        """Write the gradient of unscaled logits z [rows, columns] into `out`, which may be z.

        base [rows]: z is not logits, but P = exp(scaled z - base).
        """

    def kept_dtype(self, like: torch.Tensor) -> torch.dtype | None:
        """See `Engine`."""


class TiledEngine:
    """The `Engine` that is described above."""

    def __init__(
        self, functions: TileFunctions, *, tile_bytes: int, min_columns: int, kept_tile_bytes: int
    ) -> None:
        """`tile_bytes`: one tile of logits; `min_columns`: see `TilePlan.of`; `kept_tile_bytes`: one kept tile."""
        self._functions = functions
        self._tile_bytes, self._min_columns, self._kept_tile_bytes = tile_bytes, min_columns, kept_tile_bytes

    def kept_dtype(self, like: torch.Tensor) -> torch.dtype | None:
        """See `Engine`."""
        return self._functions.kept_dtype(like)

    def plan(self, like: torch.Tensor, rows: int, columns: int) -> TilePlan:
        """How rows [rows, H] with the dtype, device and H of `like` times so many columns are cut."""
        return TilePlan.of(
            *(rows, columns, like.shape[1]),
            itemsize=accumulation_dtype(like).itemsize,
            tile_bytes=self._tile_bytes,
            min_columns=self._min_columns,
            multiprocessors=multiprocessors(like.device),
        )

    def statistics(self, problem: Problem, *, for_backward: bool) -> tuple[Statistics, Kept | None]:
        """See `Engine`; keeps the probabilities of as many slices as `problem.keep_bytes` allows."""
        rows, like = len(problem.rows), problem.rows.like
        dtype, device = accumulation_dtype(like), like.device
        if problem.shard.columns == 0 or rows == 0:
            problem.rows.all()
            return no_columns(rows, dtype, device, problem.with_entropy), None
        plan = self.plan(like, rows, problem.shard.columns)
        inv_temperature = per_row(problem.inv_temperature, rows, dtype, device)
        state = no_columns(rows, dtype, device, problem.with_entropy)
        kept = None
        if for_backward and plan.whole_rows:
            slices, kept_dtype = list(plan.column_slices()), self.kept_dtype(like)
            kept = Kept(
                *(slices, rows, state.total, kept_dtype),
                keep_bytes=problem.keep_bytes,
                tile_bytes=self._kept_tile_bytes,
            )
        buffer = torch.empty(plan.tile_elements, dtype=dtype, device=device)
        for columns in plan.column_slices():
            weight = mm_operand(problem.weight[columns])
            keep = self._room(kept, columns)
            for block in plan.row_slices():
                z = _tile(buffer, block, columns)
                _logits(problem, plan, block, weight, z)
                self._functions.statistics(
                    z,
                    problem.labels[block],
                    inv_temperature[block],
                    state.at(block),
                    problem.shard.first + columns.start,
                    keep,
                )
        return state, kept if kept is not None and kept.columns else None

    @staticmethod
    def _room(kept: Kept | None, columns: slice) -> Keep | None:
        """Where this slice's probabilities go. Memory that is not there is not asked for again."""
        if kept is None:
            return None
        try:
            values = kept.room_for(columns)
        except torch.OutOfMemoryError:
            kept.stop()
            shrink_keep_budget(kept.base.device, kept.nbytes)
            return None
        return None if values is None else Keep(values, kept.base, first=columns.start == 0)

    def gradients(
        self,
        problem: Problem,
        upstream: Upstream,
        kept: Kept | None,
        hidden: HiddenGradient | None,
        weight: WeightGradient | None,
    ) -> None:
        """See `Engine`."""
        first = 0
        if kept is not None:
            first = kept.columns
            self._from_kept(problem, upstream, kept, hidden, weight)
        if first < problem.shard.columns:
            self._from_logits(problem, upstream, first, hidden, weight)

    def _from_kept(
        self,
        problem: Problem,
        upstream: Upstream,
        kept: Kept,
        hidden: HiddenGradient | None,
        weight: WeightGradient | None,
    ) -> None:
        """The part of the columns that were kept. Without an entropy gradient dz is a row factor times P."""
        rows, like, shard = len(problem.rows), problem.rows.like, problem.shard
        inv_temperature = per_row(problem.inv_temperature, rows, accumulation_dtype(like), like.device)
        factor, entries = None, upstream.label_gradient(inv_temperature)
        if upstream.grad_entropy is None:
            factor = kept.row_factor(upstream.grad_logprobs * inv_temperature, upstream.lse)
            entries = kept.label_entries(upstream.logprobs, upstream.lse)
        inputs: torch.Tensor | None = None
        everything, last = slice(0, rows), kept.columns
        for columns, values in kept.take():
            first_column = shard.first + columns.start
            if factor is None:
                self._functions.gradient(
                    values, problem.labels, inv_temperature, upstream, values, first_column, kept.base
                )
            # From the exact log-prob: for a confident token 1 - p of a rounded p would be nothing but rounding.
            put_labels_(values, problem.labels, first_column, entries)
            operand = mm_operand(values)
            if hidden is not None:
                hidden.add(everything, operand, mm_operand(problem.weight[columns]))
                if columns.stop == last and factor is not None:
                    hidden.scale_rows_(factor)
                if columns.stop == shard.columns:
                    # dX is complete: it is reduced over the group while the last product of dW runs.
                    hidden.complete()
            if weight is not None:
                if inputs is None:
                    # Not before the first product of dX, which does not need the rows: they may be on their way.
                    inputs = mm_operand(problem.rows.all())
                    if factor is not None:
                        scaled = torch.empty_like(inputs)
                        inputs = torch.mul(inputs, factor.unsqueeze(1), out=scaled)
                weight.add(columns, operand, inputs, only=True)
                weight.close(columns)
            del values, operand

    def _from_logits(
        self,
        problem: Problem,
        upstream: Upstream,
        first: int,
        hidden: HiddenGradient | None,
        weight: WeightGradient | None,
    ) -> None:
        """The columns from `first` on: logits again, their gradient, and two products."""
        rows, like, shard = len(problem.rows), problem.rows.like, problem.shard
        dtype, device = accumulation_dtype(like), like.device
        plan = self.plan(like, rows, shard.columns - first)
        inv_temperature = per_row(problem.inv_temperature, rows, dtype, device)
        operand_dtype = mm_operand(like[:0]).dtype
        logits = torch.empty(plan.tile_elements, dtype=dtype, device=device)
        # In the dtype of the logits the gradient overwrites them, value by value.
        grads = logits
        if operand_dtype != dtype:
            grads = torch.empty(plan.tile_elements, dtype=operand_dtype, device=device)
        for columns in plan.column_slices(first):
            weight_operand = mm_operand(problem.weight[columns])
            for block in plan.row_slices():
                z, dz = _tile(logits, block, columns), _tile(grads, block, columns)
                _logits(problem, plan, block, weight_operand, z)
                self._functions.gradient(
                    z,
                    problem.labels[block],
                    inv_temperature[block],
                    upstream.at(block),
                    dz,
                    shard.first + columns.start,
                    None,
                )
                if hidden is not None:
                    hidden.add(block, dz, weight_operand)
                    if columns.stop == shard.columns and block.stop == rows:
                        hidden.complete()
                if weight is not None:
                    weight.add(columns, dz, mm_operand(problem.rows.all()[block]), only=plan.whole_rows)
            if weight is not None:
                weight.close(columns)


def per_row(value: float | torch.Tensor, rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows] in `dtype`, which is what the kernels read."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    return torch.full((rows,), value, dtype=dtype, device=device)


def _tile(buffer: torch.Tensor, block: slice, columns: slice) -> torch.Tensor:
    """The beginning of a flat buffer as [rows of block, columns]."""
    height, width = block.stop - block.start, columns.stop - columns.start
    stride = padded(width)
    return buffer[: height * stride].view(height, stride)[:, :width]


def _logits(problem: Problem, plan: TilePlan, block: slice, weight: torch.Tensor, z: torch.Tensor) -> None:
    """Write the unscaled logits of a block of rows and a slice `weight` [columns, H] into z."""
    if plan.whole_rows:
        for piece, rows in problem.rows.pieces():
            mm(mm_operand(rows), weight.t(), out=z[piece])
    else:
        mm(mm_operand(problem.rows.all()[block]), weight.t(), out=z)
