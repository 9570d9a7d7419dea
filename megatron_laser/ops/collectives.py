"""The log-prob op and its tensor-parallel group: reductions, and rows that are gathered while the first are in use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in `group`; None is a group of one."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This rank's index in `group`."""
    return 0 if group is None else group.rank()


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`tensor` of every rank, which has the same shape on all: [size, *shape], in rank order."""
    gathered = tensor.new_empty((group_size(group), *tensor.shape))
    dist.all_gather_into_tensor(gathered.view(-1, *tensor.shape[1:]), tensor.contiguous(), group=group)
    return gathered


def start_reduction(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, *, scatter: bool
) -> tuple[torch.Tensor, dist.Work | None]:
    """Start the sum of [rows, H] over the group: (result, work to wait for, None if there is nothing to do).

    scatter: keep only this rank's [rows / size, H]; else the sum is in place. Collectives of NCCL and gloo add in a
    fixed order, so the result is the same from run to run.
    """
    size = group_size(group)
    if size == 1 or not tensor.numel():
        return tensor, None
    if not scatter:
        return tensor, dist.all_reduce(tensor, group=group, async_op=True)
    result = tensor.new_empty((tensor.shape[0] // size, *tensor.shape[1:]))
    return result, dist.reduce_scatter_tensor(result, tensor, group=group, async_op=True)


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
