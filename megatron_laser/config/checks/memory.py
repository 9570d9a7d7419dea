"""Settings that save memory: what goes together, and what a model must have for them."""

from __future__ import annotations

from megatron_laser.config.derived import (
    gpu_pad_multiple,
    needed_pad_multiple,
    recompute_words,
    recomputed_of_experts,
)
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.schema.root import RunConfig

# What FP8 matrix products need of every dimension (cuBLAS: rows of whole 16 bytes).
FP8_MULTIPLE = 16


def memory_problems(config: RunConfig) -> list[str]:
    """Problems that show without the model; one line each."""
    return [*_recompute_problems(config), *_precision_problems(config)]


def _recompute_problems(config: RunConfig) -> list[str]:
    model, problems = config.model, []
    how = recompute_words(model)
    if model.recompute_layers is not None and model.recompute != "full":
        problems.append(
            f"model.recompute_layers: {model.recompute_layers} counts layers that are recomputed whole, and "
            f"model.recompute is {how}; set model.recompute to full, or leave recompute_layers null"
        )
    if model.offload_activations and (model.recompute != "full" or model.recompute_layers is not None):
        problems.append(
            f"model.offload_activations: true moves layers' inputs, and with model.recompute {how}"
            + (f" of {model.recompute_layers} layers" if model.recompute_layers is not None else "")
            + " layers keep more than these; set model.recompute to full, of all layers"
        )
    needs_engine = recomputed_of_experts(model)
    if needs_engine and model.layers == "torch":
        problems.append(
            f"model.recompute: {how} with model.layers torch: {' and '.join(needs_engine)} can be recomputed in "
            "Transformer Engine's layers only"
        )
    return problems


def _precision_problems(config: RunConfig) -> list[str]:
    model, settings, problems = config.model, config.optimizer, []
    for name in ("moments_dtype", "gradient_dtype"):
        if getattr(settings, name) != "float32" and model.dtype == "float32":
            problems.append(
                f"optimizer.{name}: {getattr(settings, name)} with model.dtype float32: a run in float32 keeps "
                "everything in float32; set model.dtype to bfloat16, or leave it float32"
            )
    if settings.moments_dtype != "float32":
        if not settings.distributed:
            problems.append(
                f"optimizer.moments_dtype: {settings.moments_dtype} needs optimizer.distributed: true, with which "
                "Megatron lets the optimizer keep its state so"
            )
        if model.layers == "torch":
            problems.append(
                f"optimizer.moments_dtype: {settings.moments_dtype} is for Transformer Engine's optimizer, and "
                "model.layers is torch"
            )
    if model.fp8 != "none":
        if model.dtype == "float32":
            problems.append(
                f"model.fp8: {model.fp8} with model.dtype float32: FP8 products take bfloat16 in and give it out; "
                "set model.dtype to bfloat16"
            )
        if model.layers == "torch":
            problems.append(
                f"model.fp8: {model.fp8} is for Transformer Engine's layers, and model.layers is torch"
            )
        parallel, pad = config.parallel, gpu_pad_multiple(config)
        unit = FP8_MULTIPLE * parallel.context * (parallel.tensor if parallel.sequence else 1)
        if pad % unit:
            problems.append(
                f"batching.pad_multiple {pad} with model.fp8: a rank's tokens must be a multiple of {FP8_MULTIPLE}, so "
                f"the multiple one of {unit}"
                + (
                    f" (needed by the layout: {needed_pad_multiple(parallel)})"
                    if parallel.context > 1
                    else ""
                )
            )
    return problems


def model_memory_problems(config: RunConfig, architecture: Architecture) -> list[str]:
    """Problems of these settings with this model; one line each, with the arithmetic."""
    model, problems = config.model, []
    if architecture.moe is None:
        problems += [
            f"model.recompute: {name} is for models with experts; in a {architecture.model_type} model it would change "
            "nothing"
            for name in recomputed_of_experts(model)
        ]
    if model.fp8 != "none":
        tensor = config.parallel.tensor
        heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
        widths = {
            "hidden_size": (architecture.hidden_size, 1),
            "query width": (heads * architecture.head_dim, tensor),
            "query, key and value width": ((heads + 2 * kv_heads) * architecture.head_dim, tensor),
        }
        if architecture.moe is None:
            widths["intermediate_size"] = (architecture.intermediate_size, tensor)
        else:
            experts = architecture.moe.intermediate_size
            widths["an expert's intermediate size"] = (experts, config.parallel.expert_tensor)
        for name, (width, ranks) in widths.items():
            if width % ranks == 0 and (width // ranks) % FP8_MULTIPLE:
                problems.append(
                    f"model.fp8: {model.fp8} with {name} {width} / {ranks} = {width // ranks} on a rank, not a "
                    f"multiple of {FP8_MULTIPLE}"
                )
    return problems
