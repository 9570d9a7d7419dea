"""RMSNorm for layers without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that allows sequence parallelism; Megatron's WrappedTorchNorm refuses it.

    Under sequence parallelism each rank normalises its own rows, so the weight's gradient is a partial sum;
    the mark `sequence_parallel` makes `finalize_model_grads` add the parts up over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
