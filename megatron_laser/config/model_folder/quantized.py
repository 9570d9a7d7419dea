"""Which tensors servers hold in FP8 with `rollout.sglang.quantization: fp8`, what that takes, and which shapes allow
it.

What follows is read in SGLang 0.5.23 (paths below `sglang/srt/`).

- `--quantization fp8` over a folder of plain weights quantizes once, at the start, and cannot do it again: the weight
  is replaced by a transposed FP8 parameter without a `weight_loader`, with one scale a tensor or a row
  (`layers/quantization/fp8.py`, Fp8LinearMethod.process_weights_after_loading; experts: a new parameter and one scale
  an expert, Fp8MoEMethod). A weight-update session restores nothing there (`layers/quantization/base_config.py`,
  QuantizeMethodBase.restore_weights_before_loading does nothing and is not overridden), so the next bf16 tensors meet a
  parameter of another shape, or, where it is square, are cast into it without a scale.
- A configuration with `weight_block_size` holds [rows, columns] of float8_e4m3fn and, under the name
  `weight_scale_inv`, one float32 for each block. What is done after loading assigns to the same parameters, which keep
  their loaders (process_weights_after_loading_block_quant): new codes and scales can be loaded any number of times. So
  the trainer quantizes, and the servers load.
- Two kinds of GPU change the parameters all the same: before compute capability 8.9 weights are packed for the Marlin
  kernel (prepare_fp8_layer_for_marlin), and DeepGEMM on 10.0 and later wants powers of two for scales, in another
  layout (`model_loader/utils.py`, should_deepgemm_weight_requant_ue8m0). On a CPU AMX packs them.
"""

from __future__ import annotations

import math
import re
from typing import Any

from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.parameters import tensor_shapes

BLOCK = 128
"""Rows and columns of a block, which has one scale."""
SCALE_SUFFIX = "_scale_inv"
"""Behind a weight's name, the name of its scales: code x scale is the weight."""
CAPABILITIES = ((8, 9), (10, 0))
"""Compute capabilities that will do: from the first (Ada) to below the second (Hopper has 9.0)."""
BLOCK_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""`quantization_config` of config.json, as folders of FP8 weights have it: activations in groups of 128, as they
come."""

_QUANTIZED = re.compile(
    r".*\.self_attn\.[qkvo]_proj\.weight|.*\.mlp\.(gate|up|down)_proj\.weight|"
    r".*\.experts\.\d+\.(gate_proj|up_proj|down_proj|w[123])\.weight"
)


def is_quantized(name: str) -> bool:
    """Whether the Hugging Face tensor `name` is held in FP8: the matrices of attention, MLP and experts.

    Embedding, output layer, routers, norms and biases are not.
    """
    return _QUANTIZED.fullmatch(name) is not None


def quantized_bytes(architecture: Architecture, dtype_bytes: int) -> int:
    """Bytes of the whole model's weights; `dtype_bytes`: of what is not quantized."""
    return sum(
        math.prod(shape) + 4 * math.prod(-(-size // BLOCK) for size in shape)
        if is_quantized(name)
        else math.prod(shape) * dtype_bytes
        for name, shape in tensor_shapes(architecture).items()
    )


def block_problems(architecture: Architecture, tensor: int) -> list[str]:
    """Parts of the model that whole blocks do not fill on servers of tensor-parallel size `tensor`; one line each.

    SGLang refuses them when it starts (Fp8LinearMethod.validate_block_quant_shapes: the parts of a fused matrix, rows
    or columns that are spread over ranks) or at the first token, whose activations are quantized in whole groups.
    """
    arch = architecture
    moe = arch.moe
    heads = max(1, arch.num_key_value_heads // tensor)  # fewer than ranks: several have the same one
    parts = [
        ("hidden_size", arch.hidden_size),
        ("query rows", arch.num_attention_heads * arch.head_dim // tensor),
        ("key rows", heads * arch.head_dim),
        (
            "intermediate_size" if moe is None else "moe_intermediate_size",
            (arch.intermediate_size if moe is None else moe.intermediate_size) // tensor,
        ),
    ]
    return [
        f"rollout.sglang.quantization: fp8 with rollout.sglang.tensor {tensor}: a rank has {size} of the model's "
        f"{name}, and blocks of {BLOCK} do not fill them; use a smaller rollout.sglang.tensor, or null"
        for name, size in parts
        if size % BLOCK
    ]
