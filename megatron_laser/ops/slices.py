"""How wide the slices of a vocabulary shard are: as wide as memory allows, in whole waves of a product's tiles.

A product of M rows, N columns and depth K is computed in tiles of 128 x 256 (or 256 x 128) results, one per
multiprocessor at a time: that is the shape of cuBLAS's kernels for large half-precision products on Hopper. The time is
that of the waves, ceil(tiles / multiprocessors), and a wave that is not full takes as long as one that is: 16384 rows
times 8064 columns are 30.5 waves on 132 multiprocessors and take 31, 8448 columns are 32 and take 32.

Pure arithmetic on integers, without torch: the plan of a call and the prediction of its time
(`tools/predict_kernels.py`) are the same functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

TILE = (128, 256)
_TILE_AREA = TILE[0] * TILE[1]
# Widths are multiples of the tile's short side, so that only the last slice has tiles that are partly empty.
_MULTIPLE = TILE[0]
# Operations that an H100 or H200 does in the time of a byte from its memory: 266 and 184 at the rates of one large
# product and of a copy. It only weighs a slice's fixed cost against partly filled waves.
_OPERATIONS_PER_BYTE = 200
# Of reading and writing an accumulating product's float32 result, the part that is not hidden behind the product.
EXPOSED = 0.5
_CANDIDATES = 128


class Waste(NamedTuple):
    """Time of each product over that of the same number of operations without a partly filled wave; at least 1."""

    logits: float
    hidden_gradient: float
    weight_gradient: float


def waves(rows: int, columns: int, multiprocessors: int) -> int:
    """Waves of tiles that a product with `rows` x `columns` results takes, in the better of the two orientations."""
    short, long = TILE
    tiles = min(_ceil(rows, a) * _ceil(columns, b) for a, b in ((short, long), (long, short)))
    return _ceil(tiles, multiprocessors)


def waste(rows: int, hidden_size: int, widths: Sequence[int], multiprocessors: int) -> Waste:
    """What the slices `widths` waste in z [rows, width], dX [rows, H] and dW [width, H]."""
    full = _TILE_AREA * multiprocessors
    columns = sum(widths)
    return Waste(
        sum(waves(rows, width, multiprocessors) for width in widths) * full / (rows * columns),
        # Its depth is the width: however the columns are cut, it is the same number of waves for each column.
        waves(rows, hidden_size, multiprocessors) * full / (rows * hidden_size),
        sum(waves(width, hidden_size, multiprocessors) for width in widths) * full / (columns * hidden_size),
    )


def slice_widths(
    rows: int, hidden_size: int, columns: int, *, widest: int, multiprocessors: int
) -> list[int]:
    """Widths of consecutive slices that cover `columns` exactly, each 1 to `widest`; [] for no columns.

    Multiples of 128 wherever `widest` and `columns` are at least that, except the last, which takes the remainder and
    is at least about half as wide as the others. Among such plans the one of least predicted time: full waves of
    z = X W^T [rows, width] and of dW = dz^T X [width, H], and few slices, since every slice reads and writes
    dX [rows, H] in float32. dX's own product does not depend on the widths.

    Args:
        rows: rows of one tile of logits, at least 1.
        widest: columns that fit into a tile's memory, at least 1.
        multiprocessors: of the device; 132 on an H100 or H200.
    """
    _positive(rows=rows, hidden_size=hidden_size, widest=widest, multiprocessors=multiprocessors)
    # The rows of a call differ from step to step, but a tile is not cheaper for being partly filled: this keeps the
    # distinct plans, and with them the time that a call spends here, few.
    rows = _ceil(rows, TILE[0]) * TILE[0]
    widest, multiple = _whole_tiles(min(widest, columns))
    return list(_best_widths(rows, hidden_size, columns, widest, multiple, multiprocessors))


def row_blocks(rows: int, hidden_size: int, columns: int, *, most: int, multiprocessors: int) -> list[int]:
    """Rows of consecutive blocks that cover `rows` exactly, each 1 to `most`, for a pass that works block by block.

    As `slice_widths`, with the parts exchanged: full waves of z and of dX [block, H], and few blocks, since every
    block reads and writes dW [columns, H] in float32.
    """
    _positive(hidden_size=hidden_size, columns=columns, most=most, multiprocessors=multiprocessors)
    most, multiple = _whole_tiles(min(most, rows))
    return list(_best_blocks(rows, hidden_size, columns, most, multiple, multiprocessors))


def group_slices(widths: Sequence[int], most_columns: int) -> list[slice]:
    """Consecutive slices together, as few groups as possible of at most `most_columns` columns, of even size.

    Returns slices of `widths`. A single slice that is wider than `most_columns` is a group of its own.
    """
    return list(_groups(tuple(widths), most_columns))


@functools.lru_cache(maxsize=1024)
def _best_widths(
    rows: int, hidden_size: int, columns: int, widest: int, multiple: int, multiprocessors: int
) -> tuple[int, ...]:
    # dX is read and written once a slice.
    fixed = _read_and_write(rows * hidden_size, multiprocessors)

    def cost(width: int) -> float:
        z, dw = waves(rows, width, multiprocessors), waves(width, hidden_size, multiprocessors)
        return z * hidden_size + dw * rows + fixed

    return _best(columns, widest, multiple, cost)


@functools.lru_cache(maxsize=1024)
def _best_blocks(
    rows: int, hidden_size: int, columns: int, most: int, multiple: int, multiprocessors: int
) -> tuple[int, ...]:
    # dW is read and written once a block.
    fixed = _read_and_write(columns * hidden_size, multiprocessors)

    def cost(height: int) -> float:
        z, dx = waves(height, columns, multiprocessors), waves(height, hidden_size, multiprocessors)
        return z * hidden_size + dx * columns + fixed

    return _best(rows, most, multiple, cost)


def _read_and_write(elements: int, multiprocessors: int) -> float:
    """An accumulation's exposed traffic, 8 bytes each float32 value, in units of a wave of depth 1."""
    return EXPOSED * 8 * elements * _OPERATIONS_PER_BYTE / (2 * _TILE_AREA * multiprocessors)


def _best(length: int, most: int, multiple: int, cost: Callable[[int], float]) -> tuple[int, ...]:
    """Pieces of `length`, each at most `most`, of least cost in all."""
    if length == 0:
        return ()
    cost = functools.cache(cost)

    def total(plan: tuple[int, int, tuple[int, ...]]) -> tuple[float, int, int]:
        piece, count, last = plan
        # Among equals the fewest and then the most even pieces.
        return count * cost(piece) + sum(map(cost, last)), count + len(last), piece

    # Half of `most` and less need not be looked at: two such pieces as one take no more waves. Where a few rows make
    # slices very wide, there are many waves in each, and a coarser search finds as good a width in less than 1 ms.
    step = multiple * _ceil(most // 2 // multiple + 1, _CANDIDATES)
    candidates = range(most, most // 2, -step)
    piece, count, last = min((_cut(length, candidate, multiple) for candidate in candidates), key=total)
    return (piece,) * count + last


def _cut(length: int, piece: int, multiple: int) -> tuple[int, int, tuple[int, ...]]:
    """(piece, how many of that size, the pieces after them); if the rest is small, the last two are about equal."""
    count, rest = divmod(length, piece)
    if rest == 0:
        return piece, count, ()
    if 2 * rest >= piece or count == 0:
        return piece, count, (rest,)
    pair = piece + rest
    half = min(_ceil(_ceil(pair, 2), multiple) * multiple, piece)
    return piece, count - 1, (half, pair - half)


@functools.lru_cache(maxsize=1024)
def _groups(widths: tuple[int, ...], most: int) -> tuple[slice, ...]:
    count = len(widths)
    # best[i]: (groups, sum of squared columns, end of the first group) for the slices from i on. Least squares are
    # the even groups.
    best: list[tuple[int, int, int]] = [(0, 0, count)] * (count + 1)
    for start in reversed(range(count)):
        columns, options = 0, []
        for stop in range(start + 1, count + 1):
            columns += widths[stop - 1]
            if columns > most and stop > start + 1:
                break
            groups, squares, _ = best[stop]
            options.append((groups + 1, squares + columns**2, stop))
        best[start] = min(options)
    found, start = [], 0
    while start < count:
        found.append(slice(start, best[start][2]))
        start = best[start][2]
    return tuple(found)


def _positive(**sizes: int) -> None:
    if min(sizes.values()) < 1:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"{text}: expected positive numbers.")


def _whole_tiles(most: int) -> tuple[int, int]:
    """(at most `most`, of what the pieces are multiples): of a tile's short side where that fits."""
    multiple = _MULTIPLE if most >= _MULTIPLE else 1
    return most // multiple * multiple, multiple


def _ceil(length: int, piece: int) -> int:
    return -(-length // piece)
