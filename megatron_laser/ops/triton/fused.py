"""The forward in one Triton kernel: product and online softmax, no logits in memory at all.

It needs no tile of logits (peak memory is one partial result per row and split) and reads each operand through the
Hopper copy engine. The vendor's product is the faster one on large shapes; `dispatch` says who gets what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_laser.ops.autograd import Problem
from megatron_laser.ops.collectives import GatheredRows
from megatron_laser.ops.device import interpreted, multiprocessors
from megatron_laser.ops.few_rows import FewRows
from megatron_laser.ops.statistics import Statistics, no_columns
from megatron_laser.ops.tiled_engine import per_row
from megatron_laser.ops.tiles import accumulation_dtype
from megatron_laser.ops.triton.engine import ChunkedEngine
from megatron_laser.ops.triton.merge import merge


@dataclass(frozen=True)
class FusedTile:
    """rows x columns of logits per step, depth of one load; group: row blocks that share the weight in L2."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 4
    group: int = 16


PRODUCTION_TILE = FusedTile()


@triton.jit
def fused_statistics(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    labels,
    inv_temperature,
    partials,
    rows,
    columns,
    hidden_size,
    first_column,
    row_blocks,
    column_tiles,
    splits,
    tiles_per_split,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Persistent programs over units (block of ROWS rows, split of the vocabulary).

    hidden, weight: tensor descriptors of [rows, H] and [V_shard, H], blocks [ROWS, DEPTH] and [COLUMNS, DEPTH].
    partials [3 or 4, splits, rows] float32: maximum, sum of exp, label's logit (0 elsewhere), and with ENTROPY the
    sum of exp(z - max) (z - max). Every value has one writer.
    Units of GROUP row blocks and all splits run together: their rows and tiles of the weight then stay in L2.
    """
    for unit in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        first_block = unit // (GROUP * splits) * GROUP
        blocks = tl.minimum(row_blocks - first_block, GROUP)
        within = unit - first_block * splits
        first_row = (first_block + within % blocks) * ROWS
        split = within // blocks
        row = first_row + tl.arange(0, ROWS)
        inside = row < rows
        scale = tl.load(inv_temperature + row, mask=inside, other=1.0)
        label = tl.load(labels + row, mask=inside, other=-1) - first_column
        # The last tile reaches beyond this shard, where another shard's labels are.
        label = tl.where(label < columns, label, -1)
        m = tl.full([ROWS], float("-inf"), tl.float32)
        s = tl.zeros([ROWS], tl.float32)
        t = tl.zeros([ROWS], tl.float32)
        label_logit = tl.zeros([ROWS], tl.float32)
        last_tile = tl.minimum((split + 1) * tiles_per_split, column_tiles)
        for tile in range(split * tiles_per_split, last_tile):
            z = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in range(0, hidden_size, DEPTH):
                x = hidden.load([first_row, k])
                w = weight.load([tile * COLUMNS, k])
                if WIDEN:  # the interpreter multiplies bfloat16 wrongly
                    x, w = x.to(tl.float32), w.to(tl.float32)
                z = tl.dot(x, w.T, z)
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            z = tl.where((column < columns)[None, :], z * scale[:, None], float("-inf"))
            label_logit += tl.sum(tl.where(column[None, :] == label[:, None], z, 0.0), 1)
            new_m = tl.maximum(m, tl.max(z, 1))
            base = tl.where(new_m == float("-inf"), 0.0, new_m)
            rescale = tl.exp(m - base)
            z -= base[:, None]
            p = tl.exp(z)
            if ENTROPY:
                shift = tl.where(m == float("-inf"), 0.0, m - base)
                t = (t + shift * s) * rescale + tl.sum(p * tl.where(p > 0, z, 0.0), 1)
            s = s * rescale + tl.sum(p, 1)
            m = new_m
        plane = splits * rows
        target = partials + split * rows + row
        tl.store(target, m, mask=inside)
        tl.store(target + plane, s, mask=inside)
        tl.store(target + 2 * plane, label_logit, mask=inside)
        if ENTROPY:
            tl.store(target + 3 * plane, t, mask=inside)


class FusedEngine(ChunkedEngine):
    """`ChunkedEngine` with this forward; its backward recomputes every tile."""

    def __init__(self, tile: FusedTile = PRODUCTION_TILE, splits: int | None = None, **options: int) -> None:
        """`tile`, `splits`: instead of what the shape and the device ask for."""
        super().__init__(**options)
        self._fused_tile, self._splits = tile, splits

    def statistics(self, problem: Problem, *, for_backward: bool) -> tuple[Statistics, None]:
        """See `Engine`; nothing is kept."""
        like, rows = problem.rows.like, len(problem.rows)
        if rows == 0 or problem.shard.columns == 0:
            problem.rows.all()
            return no_columns(rows, accumulation_dtype(like), like.device, problem.with_entropy), None
        maximum, total, label_logit, *moment = merge(self._partials(problem)).unbind()
        return Statistics(maximum, total, label_logit, moment[0] if moment else None), None

    def partials(self, problem: FewRows) -> torch.Tensor:
        """See `FewRowReducer`."""
        hidden, weight, labels, shard = problem
        return self._partials(Problem(GatheredRows(hidden, None), weight, labels, 1.0, shard, False))

    def _partials(self, problem: Problem) -> torch.Tensor:
        """[3, or with the entropy 4, splits, rows]."""
        hidden, shard, tile = problem.rows.all(), problem.shard, self._fused_tile
        rows, hidden_size = hidden.shape
        row_blocks = triton.cdiv(rows, tile.rows)
        column_tiles = triton.cdiv(shard.columns, tile.columns)
        programs = multiprocessors(hidden.device)
        splits = self._splits or best_splits(row_blocks, column_tiles, programs, tile.group)
        tiles_per_split = triton.cdiv(column_tiles, splits)
        splits = triton.cdiv(column_tiles, tiles_per_split)
        fields = 4 if problem.with_entropy else 3
        partials = torch.empty(fields, splits, rows, dtype=torch.float32, device=hidden.device)
        kernel: Any = fused_statistics
        kernel[(min(programs, row_blocks * splits),)](
            TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(problem.weight, [tile.columns, tile.depth]),
            problem.labels,
            per_row(problem.inv_temperature, rows, torch.float32, hidden.device),
            partials,
            rows,
            shard.columns,
            hidden_size,
            shard.first,
            row_blocks,
            column_tiles,
            splits,
            tiles_per_split,
            ENTROPY=problem.with_entropy,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            GROUP=tile.group,
            WIDEN=interpreted(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return partials


def best_splits(row_blocks: int, column_tiles: int, programs: int, group: int) -> int:
    """Splits of the vocabulary that leave the fewest steps to the busiest program; a step is one tile of logits.

    At least so many that one group of row blocks with all splits fills the device (more row blocks at once would
    fall out of L2), at most twice that. Among equals the fewest: less is written and merged.
    """
    least = max(1, min(column_tiles, programs // min(group, row_blocks)))
    most = min(column_tiles, 2 * least)

    def steps(splits: int) -> int:
        per_split = -(-column_tiles // splits)
        units = row_blocks * -(-column_tiles // per_split)
        return -(-units // programs) * per_split

    return min(range(least, most + 1), key=lambda splits: (steps(splits), splits))
