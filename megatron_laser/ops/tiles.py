"""Tiles of logits: how rows and vocabulary are cut, and the products in the accumulation dtype."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_laser.ops.collectives import group_rank, group_size

# Half-precision inputs with float32 output: the product is accumulated and returned unrounded.
_MM_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")


class Shard(NamedTuple):
    """This rank's real columns: global ids [first, first + columns); `vocab_size` over all ranks."""

    first: int
    columns: int
    vocab_size: int


def vocabulary_shard(weight: torch.Tensor, vocab_size: int | None, group: dist.ProcessGroup | None) -> Shard:
    """The real columns of this rank's `weight` [V_shard, H]; a shard of nothing but padding has none."""
    if vocab_size is None:
        vocab_size = weight.shape[0] * group_size(group)
    first = weight.shape[0] * group_rank(group)
    # Padding columns are never computed, which is the same as masking them with -inf.
    return Shard(first, min(max(vocab_size - first, 0), weight.shape[0]), vocab_size)


def has_label(labels: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Whether each row's label is a column of the whole vocabulary: [rows] bool."""
    return (labels >= 0) & (labels < shard.vocab_size)


def local_labels(labels: torch.Tensor, first: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(column [rows, 1] safe to index with, whether the label is among the columns [rows])."""
    local = labels - first
    safe = local.clamp(0, columns - 1)
    return safe.unsqueeze(1), safe == local


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float32 for inputs up to float32, float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def mm_operand(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix as `mm` wants it: half precision stays on CUDA and is widened elsewhere."""
    if tensor.is_cuda and _MM_OUT_DTYPE:
        return tensor
    return tensor.to(accumulation_dtype(tensor))


def mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Matrix product in the accumulation dtype, into `out` if given."""
    dtype = accumulation_dtype(left)
    if left.dtype == dtype:
        return torch.mm(left, right, out=out)
    if out is None:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.ops.aten.mm.dtype_out(left, right, dtype, out=out)


def add_mm_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to `out`, which has the accumulation dtype."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif _accumulates_in_place(out.device, left.dtype):
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
    else:
        out.add_(mm(left, right))


@functools.cache
def _accumulates_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one product can add half-precision operands to a float32 matrix; some versions of torch refuse.

    It saves a float32 temporary and its traffic. Asked of the device once, with a product whose result is known.
    """
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, ones, ones, total.dtype, out=total)
    except (RuntimeError, AttributeError):
        return False
    return bool((total == 17).all())


def padded(columns: int) -> int:
    """Row stride of a tile: every row is aligned, so that kernels read 16 bytes at a time."""
    return -(-columns // 16) * 16
