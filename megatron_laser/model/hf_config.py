"""From a Hugging Face configuration to Megatron's TransformerConfig and rotary frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig, PretrainedConfig

from megatron_laser.config import Architecture, ModelFolderError, read_architecture
from megatron_laser.config.model_folder.architecture import architecture_from_dict
from megatron_laser.config.schema.inputs import Recompute
from megatron_laser.model import platform
from megatron_laser.model.transformer_engine import Attention, Fp8, Layers, use_transformer_engine


def read_hf_config(path: str | Path) -> PretrainedConfig:
    """transformers' reading of a local folder's config.json, once `read_architecture` has taken it.

    Raises:
        ConfigError: the model is not supported, or the file is incomplete: what the dry run refuses.
        ModelFolderError: transformers cannot read the file, or reads another model in it than the dry run.
    """
    ours = read_architecture(path)
    file = Path(path) / "config.json"
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # of many kinds: its validation has classes of its own
        reason = " ".join(str(error).split())
        raise ModelFolderError(f"{file}: transformers cannot read it: {reason}") from error
    theirs = architecture_of(config)
    differing = [
        f"{field.name} {getattr(theirs, field.name)!r} instead of {getattr(ours, field.name)!r}"
        for field in fields(ours)
        if getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    if differing:
        raise ModelFolderError(
            f"{file}: transformers reads {', '.join(differing)}; write these keys into the file as they are meant"
        )
    return config


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture that transformers' configuration describes."""
    return architecture_from_dict(config.to_dict())


def head_dim(config: PretrainedConfig) -> int:
    """Size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_inverse_frequencies(model: Architecture) -> torch.Tensor:
    """Rotary inverse frequencies [head_dim / 2] fp32, scaling included, bit for bit those of transformers.

    llama3 (Llama 3.1): frequencies that make fewer than `low_freq_factor` turns within the original context are
    stretched by `factor`, those of more than `high_freq_factor` turns stay, those in between are mixed.
    """
    positions = torch.arange(0, model.head_dim, 2, dtype=torch.float32)
    plain = 1.0 / (model.rope_theta ** (positions / model.head_dim))
    scaling = model.rope_scaling
    if scaling is None:
        return plain
    if model.rope_type == "linear":
        return plain / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_positions / (2 * math.pi / plain)
    share = (turns - low) / (high - low)
    mixed = (1 - share) * plain / scaling.factor + share * plain
    return torch.where(turns < low, plain / scaling.factor, torch.where(turns > high, plain, mixed))


def batches_stage_exchange(virtual_pipeline: int) -> bool:
    """Whether pipeline stages exchange activations in batches of sends and receives, on the group's communicator."""
    return virtual_pipeline == 1 and platform.has_cuda()


def transformer_config(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    sequence: bool = False,
    chunk_layers: Sequence[int] = (),
    recompute: Recompute = "none",
    recompute_layers: int | None = None,
    fp8: Fp8 = "none",
    layers: Layers = "auto",
    attention: Attention = "auto",
    fuse_gradient_accumulation: bool = False,
) -> TransformerConfig:
    """Megatron's configuration for a Llama, Qwen2 or Qwen3 model, or one with experts, under a parallel layout.

    Gradients are summed, never averaged: `calculate_per_token_loss` makes DDP add gradients over data-parallel
    ranks, and every loss term is already divided by its global count.

    Args:
        chunk_layers: layers of each pipeline chunk; () where each has as many.
        recompute, recompute_layers, fp8, layers, attention: of the section `model`.
        fuse_gradient_accumulation: for layers of torch; those of Transformer Engine are told by `PolicyModel`.

    Raises:
        ConfigError: `layers` asks for a Transformer Engine that cannot be used.
    """
    fused, architecture = use_transformer_engine(layers), architecture_of(config)
    arguments: dict[str, Any] = dict(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_dim(config),
        ffn_hidden_size=config.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=context,
        sequence_parallel=sequence,
        # Micro-batches differ in length; Megatron then exchanges shapes between stages, which it allows only
        # with the all-to-all dispatcher, dense models included.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        overlap_p2p_comm=virtual_pipeline > 1,
        batch_p2p_comm=batches_stage_exchange(virtual_pipeline),
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not platform.has_cuda(),
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=fused,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=fuse_gradient_accumulation and not fused,
        apply_rope_fusion=fused,
        transformer_impl="transformer_engine" if fused else "local",
        attention_backend=AttnBackend[attention],
    )
    if moe := architecture.moe:
        arguments.update(
            num_moe_experts=moe.num_experts,
            moe_router_topk=moe.experts_per_token,
            moe_ffn_hidden_size=moe.intermediate_size,
            # Megatron's two orders of softmax and choice: before it the probabilities are of all experts, after it of
            # the chosen ones, which is the same as dividing the first by their sum.
            moe_router_pre_softmax=not moe.normalised,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_grouped_gemm=fused,
            moe_permute_fusion=fused,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
        )
    if chunk_layers:
        parts = [["decoder"] * count for count in chunk_layers]
        parts[0].insert(0, "embedding")
        parts[-1].append("loss")
        arguments.update(pipeline_model_parallel_layout=parts)
    if recompute == "full" and recompute_layers is not None:
        arguments.update(
            recompute_granularity="full", recompute_method="block", recompute_num_layers=recompute_layers
        )
    elif recompute == "full":
        arguments.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif recompute != "none":
        arguments.update(recompute_granularity="selective", recompute_modules=list(recompute))
    if fp8 != "none":
        # Gradients have a wider range than e4m3, unless each block has a scale of its own.
        arguments.update(fp8="e4m3" if fp8 == "blockwise" else "hybrid", fp8_recipe=fp8)
    return TransformerConfig(**arguments)
