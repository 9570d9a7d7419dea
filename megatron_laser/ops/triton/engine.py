"""Tiles of float32 logits from the vendor's matrix product, reduced and differentiated by Triton kernels.

Per slice of the vocabulary the forward costs one product and one read of its result; the backward recomputes the
product (or takes kept probabilities), turns it into the gradient of the logits, and adds two more products: dX,
accumulated in float32, and the slice of dW, which is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_laser.ops.autograd import HiddenGradient, Problem, Upstream
from megatron_laser.ops.settings import settings
from megatron_laser.ops.statistics import Statistics, no_columns
from megatron_laser.ops.tiles import accumulation_dtype, mm, mm_operand
from megatron_laser.ops.triton import tile_kernels
from megatron_laser.ops.weight_gradient import WeightGradient

# Fewest columns of a tile: below that the products are narrow; then the rows are cut instead.
MIN_COLUMNS = 2048
_COLUMN_MULTIPLE = 128


@dataclass(frozen=True)
class TilePlan:
    """How [rows, columns] is cut: blocks of rows inside slices of columns, all of about the same size."""

    rows: int
    columns: int
    row_block: int
    column_block: int

    @classmethod
    def of(
        cls, rows: int, columns: int, itemsize: int, tile_bytes: int, min_columns: int = MIN_COLUMNS
    ) -> TilePlan:
        """All rows of a slice if `min_columns` of them fit into `tile_bytes`, else blocks of rows too."""
        elements = max(1, tile_bytes // itemsize)
        narrow = min(columns, min_columns)
        row_block = rows
        if rows * narrow > elements:
            row_block = max(1, min(rows, elements // narrow))
        column_block = _even(columns, max(1, elements // row_block), _COLUMN_MULTIPLE)
        return cls(rows, columns, _even(rows, row_block, 1), column_block)

    def column_slices(self) -> Iterator[slice]:
        """Slices of the shard's columns."""
        for start in range(0, self.columns, self.column_block):
            yield slice(start, min(start + self.column_block, self.columns))

    def row_slices(self) -> Iterator[slice]:
        """Blocks of rows."""
        for start in range(0, self.rows, self.row_block):
            yield slice(start, min(start + self.row_block, self.rows))

    @property
    def tile_elements(self) -> int:
        """Elements of a buffer for one tile."""
        return self.row_block * padded(self.column_block)

    @property
    def whole_rows(self) -> bool:
        """Whether one tile covers all rows."""
        return self.row_block >= self.rows


def padded(columns: int) -> int:
    """Row stride of a tile: every row is aligned, so that the kernels read 16 bytes at a time."""
    return -(-columns // 16) * 16


def _even(length: int, most: int, multiple: int) -> int:
    """The size of about equal pieces of at most `most`, a multiple of `multiple` unless that exceeds `most`."""
    pieces = -(-length // most)
    even = -(-length // pieces)
    rounded = -(-even // multiple) * multiple
    return rounded if rounded <= most else min(even, most)


@dataclass(frozen=True)
class Kept:
    """Probabilities of the first slices, exp(z - maximum) in bfloat16, for the backward.

    tiles: per slice (values [rows, columns], maximum [rows, blocks] float32).
    """

    tiles: list[tuple[torch.Tensor, torch.Tensor]]


class ChunkedEngine:
    """The `Engine` that is described above."""

    def __init__(self, block: int = tile_kernels.BLOCK, min_columns: int = MIN_COLUMNS) -> None:
        """`block`: columns that one program of a kernel handles at a time; `min_columns`: see `TilePlan.of`."""
        self._block, self._min_columns = block, min_columns

    def statistics(self, problem: Problem, *, for_backward: bool) -> tuple[Statistics, Kept | None]:
        """See `Engine`; keeps the probabilities of as many slices as `keep_logits_bytes` allows."""
        rows, like = len(problem.rows), problem.rows.like
        dtype, device = accumulation_dtype(like), like.device
        if problem.shard.columns == 0 or rows == 0:
            problem.rows.all()
            return no_columns(rows, dtype, device, problem.with_entropy), None
        plan = self._plan(problem)
        kept = Kept([]) if for_backward and plan.whole_rows and settings().keep_logits_bytes else None
        budget = settings().keep_logits_bytes or 0
        inv_temperature = per_row(problem.inv_temperature, rows, dtype, device)
        zeros = torch.zeros(4 if problem.with_entropy else 3, rows, dtype=dtype, device=device)
        state = (
            zeros[0].fill_(float("-inf")),
            zeros[1],
            zeros[2],
            zeros[3] if problem.with_entropy else None,
        )
        buffer = torch.empty(plan.tile_elements, dtype=dtype, device=device)
        for columns in plan.column_slices():
            weight = mm_operand(problem.weight[columns])
            width = columns.stop - columns.start
            keep = None
            if kept is not None and budget >= rows * width * 2:
                budget -= rows * width * 2
                values = torch.empty(rows, padded(width), dtype=torch.bfloat16, device=device)[:, :width]
                keep = (values, torch.empty(rows, -(-width // self._block), dtype=dtype, device=device))
                kept.tiles.append(keep)
            else:
                budget = 0  # The kept slices are the first ones.
            for block in plan.row_slices():
                z = _tile(buffer, block, width)
                _logits(problem, plan, block, weight, z)
                tile_kernels.launch_statistics(
                    z,
                    problem.labels[block],
                    inv_temperature[block],
                    (
                        state[0][block],
                        state[1][block],
                        state[2][block],
                        None if state[3] is None else state[3][block],
                    ),
                    problem.shard.first + columns.start,
                    keep,
                    self._block,
                )
        return Statistics(*state), kept

    def gradients(
        self,
        problem: Problem,
        upstream: Upstream,
        kept: Kept | None,
        hidden: HiddenGradient | None,
        weight: WeightGradient | None,
    ) -> None:
        """See `Engine`."""
        rows, like = len(problem.rows), problem.rows.like
        dtype, device = accumulation_dtype(like), like.device
        plan = self._plan(problem)
        inv_temperature = per_row(problem.inv_temperature, rows, dtype, device)
        operand_dtype = mm_operand(like[:0]).dtype
        elements = plan.tile_elements
        logits = torch.empty(elements, dtype=dtype, device=device)
        # In the dtype of the logits the gradient overwrites them, value by value.
        grads = (
            logits if operand_dtype == dtype else torch.empty(elements, dtype=operand_dtype, device=device)
        )
        tiles = iter(kept.tiles if kept is not None else ())
        for columns in plan.column_slices():
            weight_operand = mm_operand(problem.weight[columns])
            width = columns.stop - columns.start
            tile = next(tiles, None)
            for block in plan.row_slices():
                if tile is None:
                    z, kept_maximum = _tile(logits, block, width), None
                    _logits(problem, plan, block, weight_operand, z)
                else:
                    z, kept_maximum = tile
                dz = _tile(grads, block, width)
                tile_kernels.launch_gradient(
                    z,
                    problem.labels[block],
                    inv_temperature[block],
                    (
                        upstream.lse[block],
                        None if upstream.entropy is None else upstream.entropy[block],
                        upstream.grad_logprobs[block],
                        None if upstream.grad_entropy is None else upstream.grad_entropy[block],
                    ),
                    dz,
                    problem.shard.first + columns.start,
                    kept_maximum,
                    self._block,
                )
                if hidden is not None:
                    hidden.add(block, dz, weight_operand)
                    if columns.stop == plan.columns and block.stop == rows:
                        # dX is complete: it is reduced over the group while the last product of dW runs.
                        hidden.complete()
                if weight is not None:
                    weight.add(columns, dz, mm_operand(problem.rows.all()[block]), only=plan.whole_rows)
            if weight is not None:
                weight.close(columns)

    def _plan(self, problem: Problem) -> TilePlan:
        itemsize = accumulation_dtype(problem.weight).itemsize
        return TilePlan.of(
            len(problem.rows), problem.shard.columns, itemsize, settings().tile_bytes, self._min_columns
        )


def per_row(value: float | torch.Tensor, rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows] in `dtype`, which is what the kernels read."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    return torch.full((rows,), value, dtype=dtype, device=device)


def _tile(buffer: torch.Tensor, block: slice, width: int) -> torch.Tensor:
    """The beginning of a flat buffer as [rows of block, width]."""
    height, stride = block.stop - block.start, padded(width)
    return buffer[: height * stride].view(height, stride)[:, :width]


def _logits(problem: Problem, plan: TilePlan, block: slice, weight: torch.Tensor, z: torch.Tensor) -> None:
    """Write the unscaled logits of a block of rows and a slice `weight` [columns, H] into z."""
    if plan.whole_rows:
        for piece, rows in problem.rows.pieces():
            mm(mm_operand(rows), weight.t(), out=z[piece])
    else:
        mm(mm_operand(problem.rows.all()[block]), weight.t(), out=z)
