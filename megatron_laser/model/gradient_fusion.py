"""Whether dW is added to main_grad inside its own matrix product (gradient accumulation fusion)."""

from __future__ import annotations

from typing import Literal

from megatron.core.tensor_parallel import layers as megatron_layers

from megatron_laser.errors import ConfigError
from megatron_laser.model import platform

Fusion = Literal["auto", "on", "off"]


def fuses_gradient_accumulation(setting: Fusion, *, transformer_engine: bool) -> bool:
    """Whether layers fuse, under `optimizer.gradient_accumulation_fusion`.

    Transformer Engine's layers bring it along; torch's need apex's extension, as Megatron's
    ColumnParallelLinear has it. `auto` fuses on CUDA where either is there.

    Raises:
        ConfigError: `on`, and neither is there.
    """
    available = transformer_engine or has_apex_extension()
    if setting == "on" and not available:
        raise ConfigError(
            [
                "optimizer.gradient_accumulation_fusion: on needs layers of Transformer Engine (model.layers) or apex "
                "built with its CUDA extensions (fused_weight_gradient_mlp_cuda), and neither is there; set it to auto"
            ]
        )
    return setting == "on" or (setting == "auto" and available and platform.has_cuda())


def has_apex_extension() -> bool:
    """Whether Megatron found apex's fused_weight_gradient_mlp_cuda."""
    # Private: read in Megatron-Core 0.16.1 and 0.19.2.
    return bool(megatron_layers._grad_accum_fusion_available)
