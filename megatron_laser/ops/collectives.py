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
    """The op's rows [n, H]: of this rank, or of all ranks of a group in rank order, all of them or those at `rows`.

    The all-gather starts in the constructor and runs beside the first products, which need only this rank's rows.
    Without a group there is nothing to gather.
    """

    def __init__(
        self,
        shard: torch.Tensor,
        group: dist.ProcessGroup | None,
        rows: torch.Tensor | None = None,
        own_rows: tuple[int, int] | None = None,
    ) -> None:
        """Start the gather.

        Args:
            shard: [T, H] of this rank; every rank of the group has the same T.
            rows: [n] int64 positions in the gathered [size * T, H]; None: all of them, once.
            own_rows: rows[first:last] are in `shard`; None: unknown, and the first product waits for the gather.
        """
        size = group_size(group)
        self._shard, self._rows = shard, rows
        self._work: dist.Work | None = None
        self._first = 0
        self._selected: torch.Tensor | None = None
        self._gathered = shard
        self._own = None
        if size > 1 and shard.numel():
            self._gathered = shard.new_empty((size * shard.shape[0], *shard.shape[1:]))
            self._first = group_rank(group) * shard.shape[0]
            if rows is None:
                self._own = slice(self._first, self._first + shard.shape[0])
            elif own_rows is not None:
                self._own = slice(*own_rows)
            self._work = dist.all_gather_into_tensor(
                self._gathered, shard.contiguous(), group=group, async_op=True
            )
        self._tokens = size * shard.shape[0]

    def __len__(self) -> int:
        return self._tokens if self._rows is None else self._rows.shape[0]

    @property
    def like(self) -> torch.Tensor:
        """A tensor with the rows' dtype, device and H, without waiting for the gather."""
        return self._shard

    @property
    def tokens(self) -> int:
        """Rows of all ranks, before `rows` chooses among them."""
        return self._tokens

    def positions(self, chosen: torch.Tensor | None) -> torch.Tensor | None:
        """Positions among the tokens of the rows at `chosen` [m] (None: all rows); None for every token once."""
        if chosen is None:
            return self._rows
        return chosen if self._rows is None else self._rows[chosen]

    def all(self) -> torch.Tensor:
        """All rows [n, H]; waits for the gather."""
        if self._selected is None:
            if self._work is not None:
                self._work.wait()
                self._work = None
            self._selected = (
                self._gathered if self._rows is None else self._gathered.index_select(0, self._rows)
            )
            self._gathered = self._shard  # what was gathered is not needed beside the selection
        return self._selected

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(position, rows) that together cover all: this rank's own first while the others are under way."""
        own = self._own
        if self._work is None or own is None or own.start == own.stop:
            yield slice(0, len(self)), self.all()
            return
        yield (
            own,
            self._shard if self._rows is None else self._shard.index_select(0, self._rows[own] - self._first),
        )
        gathered = self.all()
        for piece in (slice(0, own.start), slice(own.stop, len(self))):
            if piece.stop > piece.start:
                yield piece, gathered[piece]
