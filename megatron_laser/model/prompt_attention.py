"""Packed causal attention whose sequences stand behind shared ones, on a CPU.

A response sees its own tokens up to each query, and all of the prompt that its group shares; a prompt may in turn stand
behind what all prompts begin with. Each part is one call of torch's flash attention, and the parts of a query are put
together by their log-sum-exps, as in ring attention (Liu et al. 2023, arXiv 2310.01889): nothing is copied for each
response, and no mask is made. The backward of a part is the kernel's own with the result and log-sum-exp of the whole.

The calls are torch's operators below `scaled_dot_product_attention`, which does not hand out the log-sum-exp: read in
2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_laser.model.sequence_batches import PaddedBatch, padded_batch, similar_lengths

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class PromptLayout:
    """own: all sequences in right-padded batches. shared: packed rows of a sequence, and of all that see it whole."""

    own: tuple[PaddedBatch, ...]
    shared: tuple[tuple[slice, slice], ...]


def prompt_layout(cu_seqlens: torch.Tensor, parents: np.ndarray) -> PromptLayout:
    """The layout of sequences `cu_seqlens` ([sequences + 1] int32) with `parents` as in `batching.PackedMicroBatch`.

    Raises ValueError where the sequences that see another one do not stand next to each other.
    """
    bounds = cu_seqlens.cpu().long()
    lengths = bounds.diff()
    own = tuple(
        padded_batch(bounds[:-1][members], lengths[members], cu_seqlens.device)
        for members in similar_lengths(lengths)
    )
    behind: dict[int, list[int]] = {}
    for sequence in range(len(parents)):
        above = sequence
        while (above := int(parents[above])) >= 0:
            behind.setdefault(above, []).append(sequence)
    shared = []
    for above, below in behind.items():
        if below != list(range(below[0], below[-1] + 1)):
            raise ValueError(f"sequences {below} see sequence {above}: expected them next to each other")
        keys = slice(int(bounds[above]), int(bounds[above + 1]))
        shared.append((keys, slice(int(bounds[below[0]]), int(bounds[below[-1] + 1]))))
    return PromptLayout(own, tuple(shared))


class PromptAttention(torch.autograd.Function):
    """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] -> [tokens, heads, head_dim]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: PromptLayout,
        scale: float | None,
    ) -> torch.Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty(query.shape, dtype=wide)
        lse = torch.empty(query.shape[:2], dtype=wide)
        for batch in layout.own:
            q, k, v = (_pad(x, batch, heads) for x in (query, key, value))
            part, part_lse = _forward(q, k, v, 0.0, True, scale=scale)
            out[batch.rows] = _unpad(part, batch).to(wide)
            lse[batch.rows] = _unpad(part_lse, batch)
        for keys, queries in layout.shared:
            q = _below_each_other(query[queries], kv_heads)
            part, part_lse = _forward(q, _one(key[keys]), _one(value[keys]), 0.0, False, scale=scale)
            part, part_lse = _beside_each_other(part, heads), _beside_each_other(part_lse, heads)
            before = lse[queries].clone()
            lse[queries] = torch.logaddexp(before, part_lse)
            weight, part_weight = (before - lse[queries]).exp_(), (part_lse - lse[queries]).exp_()
            out[queries].mul_(weight.unsqueeze(2)).addcmul_(part.to(wide), part_weight.unsqueeze(2))
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        heads, kv_heads = query.shape[1], key.shape[1]
        d_query, d_key, d_value = (torch.empty(x.shape, dtype=lse.dtype) for x in (query, key, value))
        for batch in ctx.layout.own:
            padded = (_pad(x, batch, heads) for x in (grad, query, key, value, out, lse))
            parts = _backward(*padded, 0.0, True, scale=ctx.scale)
            for whole, part in zip((d_query, d_key, d_value), parts, strict=True):
                rows = _unpad(part, batch).to(whole.dtype)
                # The gradients of a key head are those of its copies, added up.
                whole[batch.rows] = rows.unflatten(1, (whole.shape[1], -1)).sum(2)
        for keys, queries in ctx.layout.shared:
            g, q, o, log_sum = (_below_each_other(x[queries], kv_heads) for x in (grad, query, out, lse))
            dq, dk, dv = _backward(
                g, q, _one(key[keys]), _one(value[keys]), o, log_sum, 0.0, False, scale=ctx.scale
            )
            d_query[queries] += _beside_each_other(dq, heads)
            d_key[keys] += dk[0].transpose(0, 1)
            d_value[keys] += dv[0].transpose(0, 1)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _pad(packed: torch.Tensor, batch: PaddedBatch, heads: int) -> torch.Tensor:
    """Packed [tokens, some heads, ...] as [batch, heads, width, ...], each head so often that they are `heads`.

    Padding is 0: with log-sum-exp 0 its queries have finite probabilities, and with gradient 0 they give none.
    """
    padded = packed.new_zeros(batch.batch * batch.width, *packed.shape[1:])
    padded[batch.slots] = packed[batch.rows]
    if packed.shape[1] != heads:
        padded = padded.repeat_interleave(heads // packed.shape[1], dim=1)
    return padded.view(batch.batch, batch.width, heads, *packed.shape[2:]).transpose(1, 2)


def _unpad(padded: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """[batch, heads, width, ...] as [real tokens, heads, ...], in the order of `batch.rows`."""
    return padded.transpose(1, 2).flatten(0, 1)[batch.slots]


def _one(packed: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] as a batch of one sequence."""
    return packed.transpose(0, 1).unsqueeze(0)


def _below_each_other(packed: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[tokens, heads, ...] as [1, kv_heads, heads / kv_heads * tokens, ...]: a key head's queries as if of one head."""
    return packed.unflatten(1, (kv_heads, -1)).movedim(0, 2).flatten(1, 2).unsqueeze(0)


def _beside_each_other(stacked: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse: [tokens, heads, ...]."""
    group = heads // stacked.shape[1]
    return stacked[0].unflatten(1, (group, -1)).movedim(2, 0).flatten(1, 2)
