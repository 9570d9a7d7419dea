"""Transformer Engine: whether layers are built from its modules, and whether the installed one can be used."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Literal

import torch

from megatron_laser.errors import ConfigError
from megatron_laser.model import platform
from megatron_laser.ops.device import capability

if TYPE_CHECKING:  # Megatron is imported after `settle`
    from megatron.core.transformer.transformer_config import TransformerConfig

logger = logging.getLogger(__name__)

Fp8 = Literal["none", "blockwise", "tensorwise"]
Layers = Literal["auto", "transformer_engine", "torch"]
Attention = Literal["auto", "flash", "fused"]

#: Older releases lack what Megatron-Core 0.19 calls without asking for the version.
OLDEST = (2, 8)
#: The minor release with which the whole trainer was rehearsed.
REHEARSED = (2, 20)

# What Megatron sets for each model.attention; variables of another value stop it while it builds the model.
_BACKEND_VARIABLES = {
    "auto": {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "1"},
    "flash": {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"},
    "fused": {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"},
}
# What Megatron set for the models of this process: nobody else's choice, so another model may have another one.
_set_for_models: dict[str, str] = {}


_ABSENT = "not installed"


def use_transformer_engine(layers: Layers = "auto") -> bool:
    """Whether layers are built from Transformer Engine modules under `model.layers`.

    `auto` means Transformer Engine on CUDA and torch on a CPU, whatever is installed: a GPU never falls back silently.

    Raises:
        ConfigError: Transformer Engine is wanted and is absent, too old, or fails to import; has the reason.
    """
    if layers == "torch" or (layers == "auto" and not platform.has_cuda()):
        return False
    if problem := _problem():
        raise ConfigError([f"model.layers: {layers} {problem}"])
    return True


def settle(layers: Layers) -> None:
    """Find out about Transformer Engine before Megatron-Core is imported.

    Megatron takes an ImportError for an absent Transformer Engine and dies of any other error, with which a library of
    another CUDA shows as well. Where it is not wanted such a Transformer Engine is hidden from Megatron.

    Raises ConfigError as `use_transformer_engine` does.
    """
    if not use_transformer_engine(layers) and (reason := _import_error()) not in ("", _ABSENT):
        logger.warning("Transformer Engine is installed and not used; it fails to import: %s", reason)
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def backend_variable_problems(attention: Attention) -> list[str]:
    """One line when the environment chooses another attention backend than `model.attention`; else nothing.

    What was set for an earlier model of this process is not the environment's choice.
    """
    found = [
        f"{name}={os.environ[name]}"
        for name, value in _BACKEND_VARIABLES[attention].items()
        if os.environ.get(name, value) not in (value, _set_for_models.get(name))
    ]
    if not found:
        return []
    return [
        f"model.attention: {attention}, but the environment has {', '.join(found)}; Transformer Engine's attention is "
        "chosen by model.attention (auto, flash, fused), from which these variables are set: unset them and use "
        "the setting"
    ]


def clear_backend_variables(attention: str) -> None:
    """Take back what was set for an earlier model of this process. Call before Megatron builds a model.

    `attention`: the name of the AttnBackend that Megatron is about to set the variables for. Transformer Engine reads
    them at every forward: the model that was built last decides for all of the process.
    """
    for name, value in _BACKEND_VARIABLES.get(attention, {}).items():
        if os.environ.get(name) == _set_for_models.get(name):
            os.environ.pop(name, None)
        if name not in os.environ:
            _set_for_models[name] = value


def attention_problems(
    config: TransformerConfig, *, tokens: int, longest: int, heads: tuple[int, int]
) -> list[str]:
    """One line when the attention layers of a model will find no kernel, in the words of the settings; else nothing.

    Without it the first forward would fail, with the weights read and a rollout done. Transformer Engine chooses among
    the backends that Megatron's variables leave, so call this when the model is built. Other releases than the
    rehearsed one are not asked: the function that chooses is not part of its interface.

    Args:
        tokens: of the largest micro-batch, over all context ranks. longest: of them the longest sequence's.
        heads: query and key heads on one rank.
    """
    version = str(sys.modules["transformer_engine"].__version__) if config.transformer_impl != "local" else ""
    if not version or config.params_dtype == torch.float32 or _release(version) != REHEARSED:
        return []
    utils: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    size, head_dim = config.context_parallel_size, config.kv_channels
    longest = -(-longest // (2 * size)) * 2 * size
    any_order = bool(int(os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")))
    asked = utils.AttentionParams(
        qkv_dtype=config.params_dtype,
        qkv_layout="thd_thd_thd",
        num_heads=heads[0],
        num_gqa_groups=heads[1],
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        num_tokens_q=tokens // size,
        num_tokens_kv=tokens // size,
        head_dim_qk=head_dim,
        head_dim_v=head_dim,
        attn_mask_type="padding_causal",
        window_size=(-1, 0),
        bottom_right_diagonal=False,
        context_parallel=size > 1,
        cp_size=size,
        deterministic=not any_order or torch.are_deterministic_algorithms_enabled(),
    )
    *_, available = utils.get_attention_backend(asked)
    if any(available):
        return []
    split = f" with parallel.context {size}" if size > 1 else ""
    return [
        f"model.attention: {config.attention_backend.name}{split}: Transformer Engine {version} has no kernel for it "
        f"here ({config.params_dtype}, head_dim {head_dim}, {heads[0]} heads and {heads[1]} key heads on a rank). Its "
        "fused attention of packed sequences needs compute capability 9.0 and cuDNN 9.6 or newer, its flash attention "
        "the package flash-attn; run with NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 to see what it says of each. Or set "
        "model.layers: torch"
    ]


def fp8_problems(recipe: Fp8, layers: Layers = "auto") -> list[str]:
    """One line when FP8 products are wanted (`model.fp8`) and cannot be had here; else nothing."""
    if recipe == "none":
        return []
    if not use_transformer_engine(layers):
        return [
            f"model.fp8: {recipe} needs Transformer Engine's layers, and layers are of torch here (model.layers: "
            f"{layers}); FP8 is for GPUs from Hopper (compute capability 9.0) on. Set model.fp8 to none"
        ]
    quantization: Any = importlib.import_module("transformer_engine.pytorch.quantization")
    ask = "is_fp8_block_scaling_available" if recipe == "blockwise" else "is_fp8_available"
    able, reason = getattr(quantization, ask)(return_reason=True)
    utils: Any = importlib.import_module("transformer_engine.pytorch.utils")
    if able and utils.get_device_compute_capability() < (9, 0):
        able, reason = False, "its compute capability is below 9.0, that of Hopper"
    if able:
        return []
    return [
        f"model.fp8: {recipe} cannot run on this GPU ({platform.device_name()}): {reason.rstrip('.')}. Set "
        "model.fp8 to none"
    ]


def ring_in_pairs(context: int, layers: Layers, dtype: str) -> bool:
    """Whether attention's ring over `context` ranks exchanges by single sends and receives, not in batches.

    As in Transformer Engine 2.20.2: two ranks exchange in batches, up to Hopper. float32 has no ring.
    """
    if context == 1 or dtype == "float32" or not use_transformer_engine(layers):
        return False
    batches = os.environ.get("NVTE_BATCH_MHA_P2P_COMM", "0") != "0"
    return not batches and (context > 2 or capability(platform.device()) >= (10, 0))


@functools.cache
def _problem() -> str:
    """Why the installed Transformer Engine cannot be used; "" when it can."""
    rest = "or set model.layers: torch (torch's attention and norms, slower)"
    if reason := _import_error():
        if reason == _ABSENT:
            return f"needs Transformer Engine, which is not installed: install transformer-engine[pytorch], {rest}"
        return (
            f"needs Transformer Engine, which is installed but fails to import: {reason}. It was probably built for "
            f"another CUDA or torch ({torch.__version__} is installed): install one that fits, {rest}"
        )
    version = str(sys.modules["transformer_engine"].__version__)
    release = _release(version)
    if release < OLDEST:
        oldest, rehearsed = (".".join(map(str, numbers)) for numbers in (OLDEST, REHEARSED))
        return (
            f"needs Transformer Engine {oldest} or newer for Megatron-Core 0.19, and {version} is installed: install "
            f"{rehearsed}, which was rehearsed, {rest}"
        )
    if not importlib.import_module("megatron.core.extensions.transformer_engine").HAVE_TE:
        return f"needs Transformer Engine, but Megatron-Core finds {version} unusable; {rest}"
    if release != REHEARSED:
        logger.warning(
            "Transformer Engine %s was not rehearsed with this trainer; %d.%d was", version, *REHEARSED
        )
    return ""


@functools.cache
def _import_error() -> str:
    """What importing Transformer Engine ends with; "" when it works, `_ABSENT` when there is none."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        return _ABSENT if error.name == "transformer_engine" else _one_line(error)
    except Exception as error:
        return _one_line(error)
    return ""


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _release(version: str) -> tuple[int, int]:
    """(major, minor) of "2.20.2+abc"."""
    major, minor, *_ = version.split("+")[0].split(".")
    return int(major), int(minor)
