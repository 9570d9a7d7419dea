"""The rows of `hidden`, gathered over the tensor-parallel group while this rank's own are already in use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_laser.ops.collectives import group_rank, group_size


class GatheredRows:
    """[rows, H] of this rank as [size * rows, H] of all, in rank order; every rank has the same `rows`.

    The all-gather starts in the constructor and runs beside the first products, which need only this rank's rows.
    Without a group there is nothing to gather.
    """

    def __init__(self, shard: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        size = group_size(group)
        self._shard = shard
        self._work: dist.Work | None = None
        self._all = shard
        self._own = slice(0, shard.shape[0])
        if size > 1 and shard.numel():
            self._all = shard.new_empty((size * shard.shape[0], *shard.shape[1:]))
            first = group_rank(group) * shard.shape[0]
            self._own = slice(first, first + shard.shape[0])
            self._work = dist.all_gather_into_tensor(
                self._all, shard.contiguous(), group=group, async_op=True
            )

    def __len__(self) -> int:
        return self._all.shape[0]

    @property
    def like(self) -> torch.Tensor:
        """A tensor with the rows' dtype, device and H, without waiting for the gather."""
        return self._shard

    def all(self) -> torch.Tensor:
        """All rows; waits for the gather."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._all

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(position, rows) that together cover all: this rank's own first while the others are under way."""
        if self._work is None:
            yield slice(0, len(self)), self._all
            return
        yield self._own, self._shard
        gathered = self.all()
        for piece in (slice(0, self._own.start), slice(self._own.stop, len(self))):
            if piece.stop > piece.start:
                yield piece, gathered[piece]
