"""Packed sequences as a few right-padded batches of similar length, for kernels that know no packing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# A batch takes sequences down to this share of its longest one: at most half of it is padding.
_MIN_FILL = 0.5


@dataclass(frozen=True)
class PaddedBatch:
    """One right-padded batch of sequences out of a packed micro-batch.

    gather [batch * width] int64: the packed row that fills each padded slot (row 0 for padding).
    slots [real tokens] int64: the real slots, in order; rows [real tokens] int64: their packed rows.
    """

    batch: int
    width: int
    gather: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor


def similar_lengths(lengths: torch.Tensor) -> Iterator[torch.Tensor]:
    """Indexes of the sequences of each batch, longest first; those without tokens are in none."""
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[lengths[order] > 0]
    start = 0
    while start < len(order):
        rest = order[start:]
        members = rest[: int((lengths[rest] >= _MIN_FILL * lengths[rest[0]]).sum())]
        yield members
        start += len(members)


def padded_batch(starts: torch.Tensor, lengths: torch.Tensor, device: torch.device) -> PaddedBatch:
    """The batch of sequences that have the packed rows `starts` to `starts` + `lengths`, the longest first."""
    width = int(lengths[0])
    offsets = torch.arange(width)
    real = offsets[None, :] < lengths[:, None]
    rows = torch.where(real, starts[:, None] + offsets, 0).flatten()
    slots = real.flatten().nonzero().squeeze(1)
    return PaddedBatch(
        batch=len(lengths),
        width=width,
        gather=rows.to(device),
        slots=slots.to(device),
        rows=rows[slots].to(device),
    )


def heads_first(packed: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Packed [tokens, heads, head_dim] as the padded [batch, heads, width, head_dim] that SDPA takes."""
    return _Pad.apply(packed, batch).view(batch.batch, batch.width, *packed.shape[1:]).transpose(1, 2)


class _Pad(torch.autograd.Function):
    """Packed rows to padded slots. The real slots are a permutation, so the backward is a gather as well."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        ctx.batch, ctx.shape = batch, packed.shape
        return packed.index_select(0, batch.gather)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = grad.new_zeros(ctx.shape)
        out[ctx.batch.rows] = grad.index_select(0, ctx.batch.slots)
        return out, None
