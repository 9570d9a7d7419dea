"""Packed causal attention whose sequences are split over context-parallel ranks, through torch SDPA.

For layers without Transformer Engine and for float32, on a CPU and on CUDA; Transformer Engine has its own, a ring.
Here keys and values of the whole micro-batch are gathered, put in packed order, and each rank's queries see the keys
up to their own position. In the backward the ranks' gradients of keys and values are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_laser.batching.context import packed_order, sequence_positions
from megatron_laser.model.sequence_batches import PaddedBatch, heads_first, padded_batch, similar_lengths

# Entries of one mask of queries and keys: longer batches are worked through in blocks of queries.
_MASK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class ContextBatch:
    """A right-padded batch of sequences: this rank's `queries` among its own tokens, `keys` among all packed tokens.

    positions [batch, queries.width] int64: each query's place in its sequence; 0 in padding, whose result is dropped.
    furthest: for each column of queries the last place, on the host.
    """

    queries: PaddedBatch
    keys: PaddedBatch
    positions: torch.Tensor
    furthest: tuple[int, ...]

    def query_blocks(self) -> Iterator[tuple[slice, int]]:
        """(columns of queries, how many keys the last of them sees); a mask has at most `_MASK_ENTRIES` entries."""
        step = max(1, _MASK_ENTRIES // (self.keys.batch * self.keys.width))
        for start in range(0, self.queries.width, step):
            columns = slice(start, min(start + step, self.queries.width))
            yield columns, max(self.furthest[columns]) + 1


@dataclass(frozen=True)
class ContextLayout:
    """All batches of a micro-batch on one rank.

    order [tokens of all ranks]: where each packed token is in the ranks' tokens one rank after the other; gathered is
    its inverse. inverse [own tokens] brings the batches' joined rows back into the order of this rank's tokens.
    """

    batches: tuple[ContextBatch, ...]
    order: torch.Tensor
    gathered: torch.Tensor
    inverse: torch.Tensor


def context_layout(cu_seqlens: torch.Tensor, *, size: int, rank: int) -> ContextLayout:
    """The layout of sequences `cu_seqlens` ([sequences + 1] int32), each a multiple of 2 x `size` tokens, on a rank."""
    device = cu_seqlens.device
    bounds = cu_seqlens.cpu().long()
    lengths = bounds.diff()
    order = torch.from_numpy(packed_order(bounds.numpy(), size=size))
    places = torch.from_numpy(sequence_positions(bounds.numpy(), size=size, rank=rank))
    batches = []
    for members in similar_lengths(lengths):
        queries = padded_batch(bounds[members] // size, lengths[members] // size, device)
        flat = torch.zeros(queries.batch * queries.width, dtype=torch.int64)
        flat[queries.slots.cpu()] = places[queries.rows.cpu()]
        positions = flat.view(queries.batch, queries.width)
        batches.append(
            ContextBatch(
                queries=queries,
                keys=padded_batch(bounds[members], lengths[members], device),
                positions=positions.to(device),
                furthest=tuple(positions.amax(0).tolist()),
            )
        )
    rows = torch.cat([batch.queries.rows for batch in batches])
    return ContextLayout(tuple(batches), order.to(device), order.argsort().to(device), rows.argsort())


class GatherSequence(torch.autograd.Function):
    """Each context rank's [tokens / size, ...] to all tokens in packed order; the backward adds up and splits again."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, layout: ContextLayout, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.layout, ctx.group, ctx.own_tokens = layout, group, own.shape[0]
        everyone = own.new_empty((group.size() * own.shape[0], *own.shape[1:]))
        dist.all_gather_into_tensor(everyone, own.contiguous(), group=group)
        return everyone.index_select(0, layout.order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # In float32: a sum over ranks in bfloat16 would be rounded once more for each of them.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        wide = wide.index_select(0, ctx.layout.gathered)
        own = wide.new_empty((ctx.own_tokens, *wide.shape[1:]))
        dist.reduce_scatter_tensor(own, wide, group=ctx.group)
        return own.to(grad.dtype), None, None


def context_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSeqParams,
    *,
    scale: float | None,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Causal attention of this rank's tokens to their whole sequences. A collective over `group`.

    query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim]: of this rank's tokens, in the order of
    `batching.context_positions`. Returns [tokens, heads, head_dim]. The layout is worked out once per micro-batch and
    kept on `packed`.
    """
    layout = getattr(packed, "context_layout", None)
    if layout is None:
        layout = context_layout(packed.cu_seqlens_q, size=group.size(), rank=group.rank())
        packed.context_layout = layout  # type: ignore[attr-defined]
    both = GatherSequence.apply(torch.cat([key, value], dim=1), layout, group)
    outputs = []
    for batch in layout.batches:
        q = heads_first(query, batch.queries)
        # One copy of the key heads for each of their query heads: no fused kernel takes grouped heads with a mask.
        k, v = (repeat_heads(part, q.shape[1]) for part in heads_first(both, batch.keys).chunk(2, dim=1))
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, columns],
                k[:, :, :seen],
                v[:, :, :seen],
                attn_mask=_visible(batch.positions[:, columns], seen),
                scale=scale,
            )
            for columns, seen in batch.query_blocks()
        ]
        out = torch.cat(parts, dim=2).transpose(1, 2).reshape(-1, *query.shape[1:])
        outputs.append(out.index_select(0, batch.queries.slots))
    return torch.cat(outputs).index_select(0, layout.inverse)


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, kv_heads, width, head_dim] as [batch, heads, ...]: each key/value head for its group of query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _visible(positions: torch.Tensor, keys: int) -> torch.Tensor:
    """[batch, 1, queries, keys] bool: whether a query sees a key. Keys of padding stand behind all real ones."""
    return (positions[:, :, None] >= torch.arange(keys, device=positions.device)).unsqueeze(1)
