"""The four tensor-parallel collectives of the log-prob op; each is the identity for a group of one."""

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


def gather_rows(shard: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[rows, H] on each rank to [size * rows, H] on all, in rank order. Every rank has the same `rows`."""
    size = group_size(group)
    if size == 1 or not shard.numel():
        return shard
    result = shard.new_empty((size * shard.shape[0], *shard.shape[1:]))
    dist.all_gather_into_tensor(result, shard.contiguous(), group=group)
    return result


def scatter_sum_rows(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum [size * rows, H] over the group and keep this rank's [rows, H]: the adjoint of `gather_rows`."""
    size = group_size(group)
    if size == 1 or not tensor.numel():
        return tensor
    result = tensor.new_empty((tensor.shape[0] // size, *tensor.shape[1:]))
    dist.reduce_scatter_tensor(result, tensor.contiguous(), group=group)
    return result
