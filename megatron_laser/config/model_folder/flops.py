"""Floating-point operations of a model, from its shape: matrix products only, two for each multiply-add.

A forward multiplies each token with each layer's weight matrices (of experts with those that the token goes to, and
with the router), each query with the keys up to its own place and their weights with the values, and the rows that have
a label with the vocabulary's. Norms, activations, softmax and rotary embedding are left out, as is usual. Padding,
the padded columns of the vocabulary and what flash attention makes again in its backward are left out too: these are
operations that the model asks for, by which MFU is reckoned (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
What recomputation adds to them is `recomputed_flops`; both together are the hardware's, by which HFU is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.parameters import tensor_shapes
from megatron_laser.config.schema.inputs import Recompute


@functools.cache  # of a model with experts it goes through thousands of names, and is asked for each sample
def layer_flops_per_token(architecture: Architecture) -> int:
    """Of one layer's weight matrices, for one token; of its experts only those that it goes to."""
    attention, mlp = _matrices(architecture)
    return 2 * (attention + mlp)


@functools.cache
def mlp_flops_per_token(architecture: Architecture) -> int:
    """Of `layer_flops_per_token` what the MLP is, or the router and the experts that a token goes to."""
    return 2 * _matrices(architecture)[1]


def _matrices(arch: Architecture) -> tuple[int, int]:
    """Elements of one layer's matrices that one token is multiplied with: (attention's, the MLP's)."""
    attention = mlp = expert = 0
    for name, shape in tensor_shapes(arch).items():
        if not name.startswith("model.layers.0.") or len(shape) != 2:
            continue
        if ".experts." in name:
            expert += math.prod(shape)
        elif ".self_attn." in name:
            attention += math.prod(shape)
        else:  # a router is one of these
            mlp += math.prod(shape)
    if arch.moe is not None:
        mlp += expert * arch.moe.experts_per_token // arch.moe.num_experts
    return attention, mlp


def attention_flops(architecture: Architecture, tokens: int) -> int:
    """Of one layer's scores and weighted values over a causal sequence: a token sees itself and those before it."""
    pairs = tokens * (tokens + 1) // 2
    return 4 * architecture.num_attention_heads * architecture.head_dim * pairs


def head_flops(architecture: Architecture, labelled: int) -> int:
    """Of the vocabulary projection of so many rows."""
    return 2 * labelled * architecture.hidden_size * architecture.vocab_size


def forward_flops(architecture: Architecture, tokens: int, labelled: int) -> int:
    """Of a sequence of so many tokens, of which `labelled` go through the vocabulary projection."""
    arch = architecture
    layers = tokens * layer_flops_per_token(arch) + attention_flops(arch, tokens)
    return arch.num_layers * layers + head_flops(arch, labelled)


def training_flops(architecture: Architecture, tokens: int, labelled: int) -> int:
    """Of a forward and a backward of one sequence, arguments as of `forward_flops`: three times the forward.

    Each product has two in the backward, one for the gradient of either factor. A router or an embedding that is not
    trained is not taken off.
    """
    return 3 * forward_flops(architecture, tokens, labelled)


def recomputed_flops(
    architecture: Architecture,
    tokens: int,
    recompute: Recompute,
    *,
    layers: int | None = None,
    labelled: int = 0,
) -> int:
    """What the backward of one sequence multiplies a second time, beside `training_flops`.

    Args:
        tokens: of the sequence.
        recompute: `model.recompute`. `layernorm` and `moe_act` make no product again.
        layers: of the whole model, that are recomputed (`model.recompute_layers` of each chunk); None: all.
        labelled: rows whose logits are made again, because their probabilities were not kept
            (`model.keep_logits_gib`); whatever `recompute` says.
    """
    arch = architecture
    if recompute == "full":
        each = tokens * layer_flops_per_token(arch) + attention_flops(arch, tokens)
    elif recompute == "none":
        each = 0
    else:
        each = tokens * mlp_flops_per_token(arch) if "mlp" in recompute else 0
        each += attention_flops(arch, tokens) if "core_attn" in recompute else 0
    count = arch.num_layers if layers is None else min(layers, arch.num_layers)
    return count * each + head_flops(arch, labelled)


def flops_per_token(
    architecture: Architecture, lengths: Sequence[int], labelled: int, *, training: bool = True
) -> float:
    """Mean over all tokens of a batch, of a forward and a backward, or (`training` False) of a forward alone.

    Args:
        lengths: tokens of each sequence, prompt and response; attention is by each one's own.
        labelled: rows of all sequences together that go through the vocabulary projection.

    Raises:
        ValueError: there are no tokens.
    """
    tokens = sum(int(length) for length in lengths)
    if tokens <= 0:
        raise ValueError(f"{len(lengths)} sequences with {tokens} tokens: nothing to take a mean over")
    forward = sum(forward_flops(architecture, int(length), 0) for length in lengths)
    forward += head_flops(architecture, labelled)
    return (3 if training else 1) * forward / tokens
