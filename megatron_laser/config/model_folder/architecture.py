"""The model's shape, read from the config.json of a Hugging Face folder. No torch, no transformers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.errors import ConfigError

# Frequencies that depend neither on the sequence's length nor on a scaled attention, and the numbers that each needs.
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# What transformers takes for keys that a config.json leaves out.
_ROPE_THETA = 10000.0
_MIXTRAL_ROPE_THETA = 1000000.0
_RMS_NORM_EPS = 1e-6
_MIXTRAL_RMS_NORM_EPS = 1e-5
_MAX_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768, "qwen3_moe": 32768, "mixtral": 131072}
SUPPORTED_MODEL_TYPES = tuple(_MAX_POSITIONS)
_QWEN3_HEAD_DIM = 128
# Keys of other routers, or of parts beside the experts, in files that call themselves one of these types.
_OTHER_ROUTERS = (
    *(
        "n_group",
        "topk_group",
        "scoring_func",
        "topk_method",
        "routed_scaling_factor",
        "first_k_dense_replace",
    ),
    *("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size", "router_jitter_noise"),
)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The numbers by which rotary frequencies are stretched; a kind that does not have one leaves it 0.

    original_positions: `original_max_position_embeddings`, of the model before it was stretched.
    """

    factor: float  # linear and llama3
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_positions: float = 0.0


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """In every layer `num_experts` SwiGLU networks, of which a token goes through the best `experts_per_token`.

    The router is a linear layer without bias and a softmax over all experts. normalised: the probabilities of the
    chosen ones are divided by their sum.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    normalised: bool


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder: RMSNorm, rotary attention with grouped key/value heads, SwiGLU, one or a mixture of experts."""

    model_type: str  # llama, qwen2, qwen3, qwen3_moe or mixtral
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # of a dense layer; a mixture of experts has none
    vocab_size: int  # rows of the embedding, without padding
    tied_embeddings: bool
    rms_norm_eps: float
    max_position_embeddings: int
    qkv_bias: bool  # Qwen2
    qk_norm: bool  # Qwen3: RMSNorm over head_dim on queries and keys
    rope_theta: float
    rope_type: str  # default, linear or llama3
    rope_scaling: RopeScaling | None  # None: default
    moe: MixtureOfExperts | None = None  # None: dense


def read_architecture(folder: str | Path) -> Architecture:
    """Reads `folder`/config.json, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
        ConfigError: no such folder or file, an unsupported model, or a shape that is incomplete.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError([f"model.path: {folder} is not a folder; expected a Hugging Face model folder"])
    if not file.is_file():
        raise ConfigError([f"model.path: {folder} has no config.json; expected a Hugging Face model folder"])
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"cannot be read as JSON: {error}"], str(file)) from error
    if not isinstance(raw, dict):
        raise ConfigError([f"expected an object, got {type(raw).__name__}"], str(file))
    return architecture_from_dict(raw, source=str(file))


def architecture_from_dict(raw: dict[str, Any], source: str = "config.json") -> Architecture:
    """The architecture that the contents of a config.json describe; raises ConfigError like
    `read_architecture`."""
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            [f"model_type {model_type!r} is not supported; expected {', '.join(SUPPORTED_MODEL_TYPES)}"],
            source,
        )
    problems = _unsupported(raw)
    shape = {}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        shape[key] = _positive(raw, key, problems)
    heads = shape["num_attention_heads"]
    if "num_key_value_heads" not in raw and model_type != "llama":
        # transformers would take 32 whatever the number of heads is
        problems.append("num_key_value_heads: required and not given")
    kv_heads = heads
    if raw.get("num_key_value_heads") is not None:
        kv_heads = _positive(raw, "num_key_value_heads", problems)
    head_dim = _QWEN3_HEAD_DIM if model_type == "qwen3" else shape["hidden_size"] // heads
    if raw.get("head_dim") is not None or ("head_dim" in raw and model_type not in ("llama", "mixtral")):
        head_dim = _positive(
            raw, "head_dim", problems
        )  # only Llama's and Mixtral's classes read null as left out
    elif model_type != "qwen3" and shape["hidden_size"] % heads:
        problems.append(f"hidden_size {shape['hidden_size']} is not divisible by num_attention_heads {heads}")
    if head_dim % 2:
        problems.append(f"head_dim {head_dim} is odd, and rotary positions turn pairs of elements")
    if heads % kv_heads:
        problems.append(f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        problems.append(f"tie_word_embeddings: expected true or false, got {tied!r}")
    default_eps = _MIXTRAL_RMS_NORM_EPS if model_type == "mixtral" else _RMS_NORM_EPS
    eps = _number(raw, "rms_norm_eps", problems, default=default_eps)
    positions = _MAX_POSITIONS[model_type]
    if raw.get("max_position_embeddings") is not None:
        positions = _positive(raw, "max_position_embeddings", problems)
    rope_theta, rope_type, rope_scaling = _rope(raw, positions, problems)
    moe = _mixture(raw, problems) if model_type in ("qwen3_moe", "mixtral") else None
    if problems:
        raise ConfigError(problems, source)
    return Architecture(
        model_type=model_type,
        hidden_size=shape["hidden_size"],
        num_layers=shape["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        tied_embeddings=tied,
        rms_norm_eps=eps,
        max_position_embeddings=positions,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        rope_theta=rope_theta,
        rope_type=rope_type,
        rope_scaling=rope_scaling,
        moe=moe,
    )


def _mixture(raw: dict[str, Any], problems: list[str]) -> MixtureOfExperts:
    """The experts of a Qwen3-MoE or Mixtral file."""
    mixtral = raw["model_type"] == "mixtral"
    # transformers 5 writes Qwen3-MoE's number under Mixtral's name
    count_key = "num_local_experts" if mixtral or "num_local_experts" in raw else "num_experts"
    experts = _positive(raw, count_key, problems)
    if raw.get("num_experts", experts) != experts:
        problems.append(
            f"{count_key} {experts} and num_experts {raw['num_experts']!r}: expected the same number"
        )
    chosen = _positive(raw, "num_experts_per_tok", problems)
    if chosen > experts:
        problems.append(f"num_experts_per_tok {chosen} is more than {count_key} {experts}")
    size_key = "intermediate_size" if mixtral else "moe_intermediate_size"
    normalised = mixtral or raw.get("norm_topk_prob", False)
    if not isinstance(normalised, bool):
        problems.append(f"norm_topk_prob: expected true or false, got {normalised!r}")
    if normalised is True and chosen == 1:
        problems.append(
            "num_experts_per_tok 1 with normalised probabilities (norm_topk_prob): the one is always 1 then, and the "
            "router learns nothing; expected 2 or more"
        )
    if raw.get("decoder_sparse_step", 1) != 1 or raw.get("mlp_only_layers"):
        problems.append(
            f"decoder_sparse_step: {raw.get('decoder_sparse_step', 1)!r} with mlp_only_layers: "
            f"{raw.get('mlp_only_layers')!r} is not supported, expected experts in every layer"
        )
    if mixtral and raw.get("sliding_window"):
        problems.append(f"sliding_window: {raw['sliding_window']!r} is not supported, expected null")
    for key in _OTHER_ROUTERS:
        if raw.get(key):
            problems.append(
                f"{key}: {raw[key]!r} is a router that is not supported, expected a softmax over all experts and "
                "nothing beside them"
            )
    return MixtureOfExperts(
        num_experts=experts,
        experts_per_token=chosen,
        intermediate_size=_positive(raw, size_key, problems),
        normalised=bool(normalised),
    )


def _positive(raw: dict[str, Any], key: str, problems: list[str]) -> int:
    value = raw.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    problems.append(f"{key}: expected a positive integer, got {value!r}")
    return 1


def _number(
    raw: dict[str, Any], key: str, problems: list[str], *, default: float | None = None, inside: str = ""
) -> float:
    value = raw.get(key, default)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    problems.append(f"{inside}{key}: expected a number above 0, got {value!r}")
    return 1.0


def _unsupported(raw: dict[str, Any]) -> list[str]:
    """Switches of these model types that would change the model and that nothing here builds."""
    problems = []
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        # Qwen2 has biases on queries, keys and values, whatever this key says.
        if raw.get(key) and not (key == "attention_bias" and raw["model_type"] == "qwen2"):
            problems.append(f"{key}: {raw[key]!r} is not supported, expected false")
    kinds = raw.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        problems.append(f"layer_types: {kinds!r} is not supported, expected full_attention for every layer")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        problems.append(f"hidden_act: {activation!r} is not supported, expected 'silu'")
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method") if isinstance(raw[key], dict) else raw[key]
            problems.append(
                f"{key}: weights quantized with {method or 'an unnamed method'} cannot be trained: a cast would take "
                "their codes for numbers; use the model's original weights, or write dequantized ones and remove the "
                "key"
            )
    return problems


def _rope(raw: dict[str, Any], positions: int, problems: list[str]) -> tuple[float, str, RopeScaling | None]:
    """Base, kind and numbers of the scaling: `rope_parameters` holds all in transformers 5, `rope_theta` and
    `rope_scaling` do before. Where a file has several, transformers' order counts."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    parameters = raw.get(name) or {}
    if not isinstance(parameters, dict):
        problems.append(f"{name}: expected an object, got {parameters!r}")
        return _ROPE_THETA, "default", None
    source = parameters if "rope_theta" in parameters else raw
    default = _MIXTRAL_ROPE_THETA if raw["model_type"] == "mixtral" else _ROPE_THETA
    theta = _number(source, "rope_theta", problems, default=default)
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if kind not in _ROPE_NUMBERS:
        problems.append(f"rope_type: {kind!r} is not supported, expected {', '.join(_ROPE_NUMBERS)}")
    inside = f"{name}, rope_type {kind}: "
    numbers = {key: _number(parameters, key, problems, inside=inside) for key in _ROPE_NUMBERS.get(kind, ())}
    if kind == "llama3":
        key = "original_max_position_embeddings"
        numbers["original_positions"] = _number(parameters, key, problems, default=positions, inside=inside)
    partial = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor: {partial!r} is not supported, expected 1")
    return theta, kind, RopeScaling(**numbers) if numbers else None
