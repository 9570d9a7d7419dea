"""Packed causal attention through torch SDPA, for layers without Transformer Engine and for float32.

Megatron hands over one packed micro-batch: q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]
and `PackedSeqParams(qkv_format="thd")`. The sequences are regrouped into a few right-padded batches of
similar length, and each batch is one SDPA call with `is_causal=True`: padding stands after the real tokens, so no real
query can see it. Where sequences share others (`PackedSeqParams.parents`, set by `share_prompts`), `prompt_attention`
takes over. The regrouping is worked out once per micro-batch and kept on the `PackedSeqParams` object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_laser.model.context_attention import context_attention, repeat_heads
from megatron_laser.model.megatron_patches import set_positions
from megatron_laser.model.prompt_attention import PromptAttention, prompt_layout
from megatron_laser.model.sequence_batches import PaddedBatch, heads_first, padded_batch, similar_lengths


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
    batches = tuple(
        padded_batch(bounds[:-1][members], lengths[members], device) for members in similar_lengths(lengths)
    )
    packed = torch.cat([batch.rows for batch in batches])
    inverse = torch.empty_like(packed)
    inverse[packed] = torch.arange(len(packed), device=device)
    return PaddedLayout(batches, inverse)


def share_prompts(packed: PackedSeqParams, parents: np.ndarray, position_ids: torch.Tensor) -> None:
    """Tell attention and rotary embedding that sequences of `packed` stand behind others. On a CPU only.

    Args:
        parents: [sequences], position_ids: [tokens], as in `batching.PackedMicroBatch`.
    """
    packed.parents = parents  # type: ignore[attr-defined]
    set_positions(packed.cu_seqlens_q, position_ids)


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
        self.softmax_scale = softmax_scale
        self.context_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            self.context_group = pg_collection.cp

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
        if packed_seq_params is None and self.context_group is not None:
            raise ValueError("context parallelism splits packed sequences: packed_seq_params is missing")
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = self._sdpa(q, k, v)
            return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
        if self.context_group is not None:
            return context_attention(
                query, key, value, packed_seq_params, scale=self.softmax_scale, group=self.context_group
            )
        parents = getattr(packed_seq_params, "parents", None)
        if parents is not None:
            shared = getattr(packed_seq_params, "prompt_layout", None)
            if shared is None:
                shared = packed_seq_params.prompt_layout = prompt_layout(
                    packed_seq_params.cu_seqlens_q, parents
                )
            return PromptAttention.apply(query, key, value, shared, self.softmax_scale)
        layout = getattr(packed_seq_params, "padded_layout", None)
        if layout is None:
            layout = padded_layout(packed_seq_params.cu_seqlens_q)
            packed_seq_params.padded_layout = layout
        outputs = []
        for batch in layout.batches:
            q, k, v = (heads_first(x, batch) for x in (query, key, value))
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


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that allows sequence parallelism; Megatron's WrappedTorchNorm refuses it.

    Under sequence parallelism each rank normalises its own rows, so the weight's gradient is a partial sum;
    the mark `sequence_parallel` makes `finalize_model_grads` add the parts up over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
