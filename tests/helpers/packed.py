"""Packed sequences as Megatron is told of them. Import it after `platform.install`."""

from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def packed_params(lengths: Sequence[int]) -> PackedSeqParams:
    """Of sequences of these lengths, one behind the other."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
