"""What the backward pass keeps of a layer's forward, after Korthikanti et al. 2022 (arXiv 2205.05198), section 4.

Redone for these models: attention without a stored score matrix, RMSNorm, a gated MLP, no dropout, norms fused into the
linear layer behind them (Transformer Engine), whose backward gathers its sequence-parallel input again. With T tokens,
h hidden size, q and k widths of query and key, f MLP width, t tensor size, s = t with `parallel.sequence` and else 1,
b bytes a number:

    layer  = b T (4 h / s + (3 q + 3 k) / t + 3 f / t)
        4 h: input and output of both norms; 3 q + 3 k: the projection's output (the values are a view of it), rotated
        queries and keys, the attention's output; 3 f: both halves of the gated MLP and their product
    none   = layer for each layer and micro-batch in flight
    mlp    = the same without h / s + 3 f / t
    full   = b T h / s for each layer and micro-batch in flight, on the GPU or (`offload_activations`) in host memory

and, whatever is recomputed, one layer at a time: b T (2 h + 3 f / t) for gathered inputs and gradients, plus what
is made anew.

With experts b (T / t) c (e h + 3 f) takes the place of 3 f / t: each of T / t tokens goes to c experts of width f,
whose e `expert_tensor` ranks gather them, and as many come as go where all experts get as many tokens. The rank of a
much used one needs more. `moe_act` leaves out their product, b (T / t) c f, and `layernorm` b T h / s, the
output of the norm before them.
"""

from __future__ import annotations

from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.schema.inputs import Recompute


def layer_activation_bytes(
    architecture: Architecture,
    *,
    tokens: int,
    itemsize: int,
    tensor: int,
    sequence: bool,
    recompute: Recompute,
    expert_tensor: int = 1,
) -> tuple[int, int]:
    """(kept of each layer, made anew for one layer in the backward): the module's formula, for T = `tokens`."""
    h = architecture.hidden_size
    q = architecture.num_attention_heads * architecture.head_dim
    k = architecture.num_key_value_heads * architecture.head_dim
    s = tensor if sequence else 1
    unit = itemsize * tokens
    inside = inside_mlp(architecture, unit, tensor, expert_tensor)
    whole = unit * 4 * h // s + unit * 3 * (q + k) // tensor + inside
    moe = architecture.moe
    if recompute == "full":
        kept = unit * h // s
    elif recompute == "none":
        kept = whole
    else:
        kept = whole
        if "mlp" in recompute:
            # The norm before experts is not fused with them: its output is what they are run again from.
            kept -= inside if moe else unit * h // s + inside
        elif "moe_act" in recompute and moe is not None:
            kept -= unit * moe.experts_per_token * moe.intermediate_size // tensor
        if "layernorm" in recompute and moe is not None:
            kept -= unit * h // s
    return kept, whole - kept


def inside_mlp(architecture: Architecture, unit: int, tensor: int, expert_tensor: int) -> int:
    """Bytes between the input and the output of one layer's MLP or experts, for `unit` bytes of one number a token."""
    moe = architecture.moe
    if moe is None:
        return unit * 3 * architecture.intermediate_size // tensor
    width = expert_tensor * architecture.hidden_size + 3 * moe.intermediate_size
    return unit * moe.experts_per_token * width // tensor
