"""Floating-point operations of a model's forward, from its shape: matrix products only, two for each multiply-add."""

from __future__ import annotations

import functools
import math

from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.parameters import tensor_shapes


@functools.cache  # of a model with experts it goes through thousands of names, and is asked for each sample
def layer_flops_per_token(architecture: Architecture) -> int:
    """Of one layer's weight matrices, for one token; of its experts only those that it goes to."""
    arch = architecture
    whole = expert = 0
    for name, shape in tensor_shapes(arch).items():
        if not name.startswith("model.layers.0.") or len(shape) != 2:
            continue
        if ".experts." in name:
            expert += math.prod(shape)
        else:
            whole += math.prod(shape)
    if arch.moe is not None:
        whole += expert * arch.moe.experts_per_token // arch.moe.num_experts
    return 2 * whole


def attention_flops(architecture: Architecture, tokens: int) -> int:
    """Of one layer's scores and weighted values over a causal sequence: a token sees itself and those before it."""
    pairs = tokens * (tokens + 1) // 2
    return 4 * architecture.num_attention_heads * architecture.head_dim * pairs


def forward_flops(architecture: Architecture, tokens: int, labelled: int) -> int:
    """Of a sequence of so many tokens, of which `labelled` go through the vocabulary projection.

    A backward is twice as much. Norms, activations, softmax and rotary embedding are left out, as is usual.
    """
    arch = architecture
    layers = tokens * layer_flops_per_token(arch) + attention_flops(arch, tokens)
    return arch.num_layers * layers + 2 * labelled * arch.hidden_size * arch.vocab_size
