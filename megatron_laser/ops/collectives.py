"""Tensor-parallel reductions of the log-prob op; each is the identity for a group of one."""

from __future__ import annotations

import torch
import torch.distributed as dist


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in `group`; None is a group of one."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This rank's index in `group`."""
    return 0 if group is None else group.rank()


def reduce_max(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Element-wise maximum over the group, as a new tensor."""
    result = tensor.clone()
    dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result


def reduce_sum_(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Element-wise sum over the group, in place."""
    if group_size(group) > 1 and tensor.numel():
        dist.all_reduce(tensor, group=group)
    return tensor


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
