"""Packed causal attention through torch SDPA, for layers without Transformer Engine and for float32.

Megatron hands over one packed micro-batch: q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]
and `PackedSeqParams(qkv_format="thd")`. The sequences are regrouped into a few right-padded batches of
similar length, and each batch is one SDPA call with `is_causal=True`: padding stands after the real tokens, so no real
query can see it. The regrouping is worked out once per micro-batch and kept on the `PackedSeqParams` object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

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


@dataclass(frozen=True)
class PaddedLayout:
    """All batches of a micro-batch; `inverse` [tokens] brings their joined rows back into packed order."""

    batches: tuple[PaddedBatch, ...]
    inverse: torch.Tensor


def padded_layout(cu_seqlens: torch.Tensor) -> PaddedLayout:
    """Group the sequences of `cu_seqlens` ([sequences + 1] int32) into right-padded, similar batches."""
    device = cu_seqlens.device
    bounds = cu_seqlens.cpu().long()
    lengths = bounds[1:] - bounds[:-1]
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[lengths[order] > 0]
    batches, start = [], 0
    while start < len(order):
        width = int(lengths[order[start]])
        fits = lengths[order[start:]] >= _MIN_FILL * width
        members = order[start : start + int(fits.sum())]
        offsets = torch.arange(width)
        real = offsets[None, :] < lengths[members][:, None]
        rows = torch.where(real, bounds[:-1][members][:, None] + offsets, 0).flatten()
        slots = real.flatten().nonzero().squeeze(1)
        batches.append(
            PaddedBatch(
                batch=len(members),
                width=width,
                gather=rows.to(device),
                slots=slots.to(device),
                rows=rows[slots].to(device),
            )
        )
        start += len(members)
    packed = torch.cat([batch.rows for batch in batches])
    inverse = torch.empty_like(packed)
    inverse[packed] = torch.arange(len(packed), device=device)
    return PaddedLayout(tuple(batches), inverse)


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


class PackedSdpaAttention(MegatronModule):
    """Core attention for Megatron's SelfAttention: packed (THD) through SDPA, and plain [s, b, h, d] too."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        if config.context_parallel_size > 1:
            raise ValueError(
                "parallel.context > 1 needs Transformer Engine; torch SDPA has no ring attention"
            )
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim] for packed input, [s, b, heads * head_dim] otherwise."""
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = self._sdpa(q, k, v)
            return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
        layout = getattr(packed_seq_params, "padded_layout", None)
        if layout is None:
            layout = padded_layout(packed_seq_params.cu_seqlens_q)
            packed_seq_params.padded_layout = layout
        outputs = []
        for batch in layout.batches:
            q, k, v = (
                _Pad.apply(x, batch).view(batch.batch, batch.width, *x.shape[1:]).transpose(1, 2)
                for x in (query, key, value)
            )
            out = self._sdpa(q, k, v).transpose(1, 2).reshape(batch.batch * batch.width, *query.shape[1:])
            outputs.append(out.index_select(0, batch.slots))
        return torch.cat(outputs).index_select(0, layout.inverse)

    def _sdpa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.is_cuda and q.dtype == torch.float32:
            # The only fused kernel for float32 knows no grouped heads; without it scores would be stored.
            k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, kv_heads, width, head_dim] as [batch, heads, ...]: each key/value head for its group of query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that allows sequence parallelism; Megatron's WrappedTorchNorm refuses it.

    Under sequence parallelism each rank normalises its own rows, so the weight's gradient is a partial sum;
    the mark `sequence_parallel` makes `finalize_model_grads` add the parts up over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
