"""Bytes of a model's weights as an engine holds and reads them."""

from __future__ import annotations

import math

from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.parameters import DTYPE_BYTES, EMBEDDING, tensor_shapes
from megatron_laser.config.model_folder.quantized import quantized_bytes
from megatron_laser.config.plan.resolve import Plan


def served_bytes(plan: Plan) -> int:
    """Of the whole model, as the engine holds it."""
    itemsize = DTYPE_BYTES[plan.config.model.dtype]
    if plan.config.rollout.engine == "sglang" and plan.config.rollout.sglang.quantization:
        return quantized_bytes(plan.architecture, itemsize)
    return plan.parameters * itemsize


def expert_parameters(architecture: Architecture) -> int:
    """Of all experts in all layers; 0 for a dense model."""
    if architecture.moe is None:
        return 0
    one = 3 * architecture.moe.intermediate_size * architecture.hidden_size
    return one * architecture.moe.num_experts * architecture.num_layers


def unread_parameters(architecture: Architecture) -> int:
    """Of the embedding, of which a decoding step reads a few rows; tied, it is the output layer too, and read whole."""
    return 0 if architecture.tied_embeddings else math.prod(tensor_shapes(architecture)[EMBEDDING])


def read_bytes(plan: Plan) -> float:
    """Of what one decoding step reads whatever its rows: all weights but experts' and an untied embedding's."""
    whole = served_bytes(plan)
    of_experts = whole * expert_parameters(plan.architecture) / plan.parameters
    itemsize = DTYPE_BYTES[plan.config.model.dtype]
    return whole - of_experts - unread_parameters(plan.architecture) * itemsize


def touched_experts(architecture: Architecture, rows: float) -> float:
    """Share of a layer's experts that `rows` tokens go to, if each chooses as the others do, at random."""
    moe = architecture.moe
    if moe is None:
        return 0.0
    return 1.0 - (1.0 - moe.experts_per_token / moe.num_experts) ** rows


def cache_bytes_per_token(architecture: Architecture, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * architecture.num_layers * architecture.num_key_value_heads * architecture.head_dim * itemsize
