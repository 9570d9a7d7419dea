"""The layer spec, chosen in one place: Transformer Engine on CUDA when installed, torch modules otherwise."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_laser.model import platform
from megatron_laser.model.attention import PackedSdpaAttention

try:
    import transformer_engine.pytorch  # noqa: F401

    _HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    _HAVE_TRANSFORMER_ENGINE = False


def use_transformer_engine() -> bool:
    """Whether layers are built from Transformer Engine modules."""
    return _HAVE_TRANSFORMER_ENGINE and platform.has_cuda()


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that allows sequence parallelism; Megatron's WrappedTorchNorm refuses it.

    Under sequence parallelism each rank normalises its own rows, so the weight's gradient is a partial sum;
    the mark `sequence_parallel` makes `finalize_model_grads` add the parts up over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder block's modules for this rank's pipeline stage (and virtual stage)."""
    if use_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
        )
        norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        norm = RMSNorm
        modules = layer.submodules
        modules.input_layernorm = modules.pre_mlp_layernorm = norm
        attention = modules.self_attention.submodules
        attention.core_attention = PackedSdpaAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm
    )
