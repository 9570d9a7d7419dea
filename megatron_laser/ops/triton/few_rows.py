"""Statistics of few rows (at most 64) in one read of the weight: product and online softmax in one Triton kernel.

The weight is the left operand and the few rows the right one: the tensor cores' instruction wants 64 rows on the
left and takes 16 to 256 on the right, so 16 hidden rows are not padded to 64. Each program walks over tiles of the
vocabulary and keeps running sums; `merge.finish` makes log-probs of the programs' partial results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_laser.ops.device import interpreted, multiprocessors
from megatron_laser.ops.few_rows import FewRows


@dataclass(frozen=True)
class FewRowTile:
    """rows: hidden rows per program; columns x depth: the tile of the weight; stages: loads in flight.

    per_multiprocessor: programs that run on one multiprocessor at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    per_multiprocessor: int


# The hidden rows are read again for every tile of the weight, from the L2 cache: `rows / columns` bytes per byte of the
# weight. With 128 rows that asks for 256 columns, whose running sums no longer fit into the registers: from 65 rows
# on the fused kernel is used, which has them along the other axis.
TILES = (
    FewRowTile(rows=16, columns=128, depth=128, warps=4, stages=3, per_multiprocessor=2),
    FewRowTile(rows=32, columns=128, depth=128, warps=4, stages=2, per_multiprocessor=2),
    FewRowTile(rows=64, columns=128, depth=64, warps=4, stages=4, per_multiprocessor=2),
)


def tile_for(rows: int) -> FewRowTile:
    """The smallest tile that takes all rows, else the largest (more rows then are more programs)."""
    return next((tile for tile in TILES if tile.rows >= rows), TILES[-1])


@triton.jit
def few_row_statistics(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    labels,
    partials,
    rows,
    columns,
    hidden_size,
    first_column,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Programs [blocks of ROWS hidden rows, P]; program p takes the tiles p, p + P, ... of the vocabulary.

    hidden, weight: tensor descriptors of [rows, H] and [V_shard, H], blocks [ROWS, DEPTH] and [COLUMNS, DEPTH];
    partials [3, P, rows] float32: maximum, sum of exp, label's logit (0 where another program has it).
    Neighbouring programs of the first axis read the same tile of the weight, one of them from memory.
    """
    first_row = tl.program_id(0) * ROWS
    program, programs = tl.program_id(1), tl.num_programs(1)
    row = first_row + tl.arange(0, ROWS)
    inside = row < rows
    plane = programs * rows
    target = partials + program * rows + row
    tl.store(target + 2 * plane, tl.zeros([ROWS], tl.float32), mask=inside)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    for tile in range(program, column_tiles, programs):
        z = tl.zeros([COLUMNS, ROWS], tl.float32)
        for k in range(0, hidden_size, DEPTH):
            w = weight.load([tile * COLUMNS, k])
            x = hidden.load([first_row, k])
            if WIDEN:  # the interpreter multiplies bfloat16 wrongly
                w, x = w.to(tl.float32), x.to(tl.float32)
            z = tl.dot(w, x.T, z)
        column = tl.arange(0, COLUMNS)
        z = tl.where((column < columns - tile * COLUMNS)[:, None], z, float("-inf"))
        # Loaded and stored here, not carried along: the tile of logits leaves few registers.
        label = tl.load(labels + row, mask=inside, other=-1) - (first_column + tile * COLUMNS)
        here = (label >= 0) & (label < tl.minimum(COLUMNS, columns - tile * COLUMNS))
        local = tl.where(here, label, -1).to(tl.int32)
        label_logit = tl.sum(tl.where(column[:, None] == local[None, :], z, 0.0), 0)
        tl.store(target + 2 * plane, label_logit, mask=here & inside)
        new_m = tl.maximum(m, tl.max(z, 0))
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        s = s * tl.exp(m - base) + tl.sum(tl.exp(z - base[None, :]), 0)
        m = new_m
    tl.store(target, m, mask=inside)
    tl.store(target + plane, s, mask=inside)


class FewRowEngine:
    """A `FewRowReducer`."""

    def __init__(self, tile: FewRowTile | None = None, programs: int | None = None) -> None:
        """`tile`, `programs`: instead of what the shape and the device ask for."""
        self._tile, self._programs = tile, programs

    def partials(self, problem: FewRows) -> torch.Tensor:
        """See `FewRowReducer`."""
        hidden, weight, labels, shard = problem
        rows, hidden_size = hidden.shape
        tile = self._tile or tile_for(rows)
        row_blocks = triton.cdiv(rows, tile.rows)
        column_tiles = triton.cdiv(shard.columns, tile.columns)
        wanted = self._programs or multiprocessors(hidden.device) * tile.per_multiprocessor // row_blocks
        # The same number of tiles for all programs, but for the last ones.
        programs = triton.cdiv(column_tiles, triton.cdiv(column_tiles, max(1, wanted)))
        partials = torch.empty((3, programs, rows), dtype=torch.float32, device=hidden.device)
        kernel: Any = few_row_statistics
        kernel[(row_blocks, programs)](
            TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
            labels,
            partials,
            rows,
            shard.columns,
            hidden_size,
            shard.first,
            column_tiles,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            WIDEN=interpreted(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return partials
