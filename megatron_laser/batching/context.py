"""Which context-parallel rank has which tokens of a packed micro-batch: the zig-zag layout, in pure numpy.

A packed sequence of L tokens is cut into 2 x `size` chunks of equal length, and rank r has chunks r and
2 x size - 1 - r: with a causal mask every rank then has the same work. This is the order that Transformer Engine's
attention and Megatron's rotary embedding for packed sequences expect. Labels were shifted before anything is cut
(`packing.pack`), so no rank needs a neighbour's token.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from megatron_laser.batching.packing import PackedMicroBatch, positions_in


def context_positions(cu_seqlens: npt.NDArray[np.integer], *, size: int, rank: int) -> npt.NDArray[np.int64]:
    """The packed positions of a rank's tokens, [T / size] int64, strictly increasing.

    The ranks' positions together are 0 .. T - 1, each once. With `size` 1 they are all.

    Args:
        cu_seqlens: [n + 1], where each sequence of the packed T tokens starts, then T.

    Raises:
        ValueError: a length that 2 x `size` does not divide (`size` above 1), or `rank` out of range.
    """
    if not 0 <= rank < size:
        raise ValueError(f"context rank {rank} of {size}: expected 0 to {size - 1}.")
    starts, lengths = _sequences(cu_seqlens)
    if size == 1:
        return np.arange(int(lengths.sum()), dtype=np.int64)
    uneven = np.flatnonzero(lengths % (2 * size))
    if len(uneven):
        index = int(uneven[0])
        raise ValueError(
            f"packed sequence {index} has {int(lengths[index])} tokens: expected a multiple of 2 x {size} context "
            "ranks; pack with context_size."
        )
    chunk = lengths // (2 * size)
    first = np.stack([starts + rank * chunk, starts + (2 * size - 1 - rank) * chunk], axis=1).ravel()
    counts = np.repeat(chunk, 2)
    return np.repeat(first, counts) + positions_in(counts)


def sequence_positions(cu_seqlens: npt.NDArray[np.integer], *, size: int, rank: int) -> npt.NDArray[np.int64]:
    """The places of a rank's tokens within their sequences, [T / size] int64; arguments as `context_positions`."""
    starts, lengths = _sequences(cu_seqlens)
    return context_positions(cu_seqlens, size=size, rank=rank) - np.repeat(starts, lengths // size)


def packed_order(cu_seqlens: npt.NDArray[np.integer], *, size: int) -> npt.NDArray[np.int64]:
    """[T] int64: where each packed position is in the ranks' tokens one rank after the other.

    `gathered[packed_order(...)]` is in packed order again.
    """
    everyone = np.concatenate([context_positions(cu_seqlens, size=size, rank=rank) for rank in range(size)])
    order = np.empty_like(everyone)
    order[everyone] = np.arange(len(everyone))
    return order


def context_shard(packed: PackedMicroBatch, *, size: int, rank: int) -> PackedMicroBatch:
    """A rank's share: its [T / size] tokens and their labelled rows, whose `row_index` is among those tokens.

    `cu_seqlens` and `max_seqlen` stay those of the whole sequences. A rank may have no labelled row; each labelled
    row, of a response token or of a score, is one rank's. Raises ValueError as `context_positions` does.
    """
    if size == 1 and rank == 0:
        return packed
    positions = context_positions(packed.cu_seqlens, size=size, rank=rank)
    place = np.full(len(packed.tokens), -1, dtype=np.int64)
    place[positions] = np.arange(len(positions))
    row_index = place[packed.row_index]
    own = row_index >= 0
    return replace(
        packed,
        tokens=packed.tokens[positions],
        position_ids=packed.position_ids[positions],
        row_index=row_index[own],
        labels=packed.labels[own],
        is_score=packed.is_score[own],
        slot=packed.slot[own],
        sample_index=packed.sample_index[own],
        response_position=packed.response_position[own],
        inv_temperature=packed.inv_temperature[own],
    )


def _sequences(
    cu_seqlens: npt.NDArray[np.integer],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Start and length of each sequence."""
    bounds = np.asarray(cu_seqlens, dtype=np.int64)
    return bounds[:-1], np.diff(bounds)
