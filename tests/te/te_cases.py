"""What is rehearsed: models, layouts, rollouts and the figures that are compared."""

import os

from helpers.rollouts import Response
from helpers.runs import run_config

STEPS = 3
GROUPS = [
    [Response(9, True), Response(12, False), Response(5, False)],
    [Response(7, False), Response(3, True), Response(14, True, truncated=True)],
]
COMPARED = ("total_loss", "policy_loss", "self_reward_loss", "kl_loss", "entropy", "grad_norm")
SETTINGS = (
    "laser.reasoning_warmup_steps=0",
    "laser.self_reward_warmup_steps=0",
    "policy.kl_coefficient=0.05",
    "policy.entropy_coefficient=0.01",
    "optimizer.lr=1.0e-3",
    # The usual 1e-8 would blow the rounding of vanishing gradients up to whole steps.
    "optimizer.eps=1.0e-4",
    "checkpoint.every=1",
    "data.max_prompt_tokens=16",
    "rollout.max_new_tokens=16",
)
SMALL = "batching.tokens_per_micro_batch=40"
TENSOR = ["parallel.tensor=2", SMALL]
SEQUENCE = ["parallel.tensor=2", "parallel.sequence=true"]
CONTEXT = ["parallel.context=2", SMALL]
EXPERT = ["parallel.expert=2"]
OVERLAPPED = [
    "optimizer.distributed=true",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
]
DISTRIBUTED = "optimizer.distributed=true"
OFFLOADED = ["optimizer.offload=true", "model.recompute=full", "model.offload_activations=true"]
MOMENTS, GRADIENTS = (f"optimizer.{name}_dtype=bfloat16" for name in ("moments", "gradient"))
FUSED = "optimizer.gradient_accumulation_fusion=on"
BF16 = "model.dtype=bfloat16"
# Ratios away from 1, on both sides of the clipping; in bf16 a token near its bound would decide the gradient's norm.
ROLLOUT = "policy.old_logprobs=rollout"
RECOMPUTE = "policy.old_logprobs=recompute"

FP32_CASES = {
    "tensor": {"family": "qwen2-tied", "settings": TENSOR},
    "sequence": {"family": "qwen2-tied", "settings": [*SEQUENCE, SMALL, FUSED]},
    "sequence-qwen3": {"family": "qwen3", "settings": [*SEQUENCE, FUSED]},
    "pipeline": {"family": "qwen3", "settings": ["parallel.pipeline=2", "model.recompute=full", SMALL]},
    "pipeline-tied": {"family": "qwen2-tied", "settings": ["parallel.pipeline=2", SMALL, FUSED]},
    "data": {"family": "qwen2-tied", "settings": [*OVERLAPPED, SMALL]},
    "data-fused": {"family": "llama3-rope", "settings": [*OVERLAPPED, SMALL, FUSED]},
    # float32 has this project's attention; the rotary embedding is Transformer Engine's.
    "context": {"family": "qwen2-tied", "settings": [*CONTEXT, *OVERLAPPED, FUSED]},
    "experts": {"family": "qwen3-moe", "settings": ["parallel.expert=2", *OVERLAPPED, FUSED, SMALL]},
    "experts-split": {"family": "qwen3-moe", "settings": [*SEQUENCE, "parallel.expert_tensor=2", FUSED]},
    "experts-recomputed": {
        "family": "qwen3-moe",
        "settings": ["parallel.expert=2", "model.recompute=[layernorm, moe_act]", SMALL],
    },
    "offloaded": {
        "family": "qwen3",
        "settings": ["parallel.pipeline=2", "parallel.stage_layers=[1, 3]", *OFFLOADED, SMALL],
    },
    "sequence-llama": {"family": "llama3-rope", "settings": [*SEQUENCE, SMALL]},
}
BF16_CASES = {
    "bf16": {"family": "qwen2", "settings": [*OVERLAPPED, SMALL, FUSED, BF16, "model.attention=fused"]},
    "bf16-sequence": {"family": "qwen3", "settings": [*SEQUENCE, SMALL, BF16]},
    "bf16-moments": {
        "family": "qwen2",
        "settings": [*OVERLAPPED, SMALL, BF16, MOMENTS, "optimizer.offload=true"],
    },
    "bf16-all": {"family": "qwen2", "settings": [*SEQUENCE, DISTRIBUTED, FUSED, BF16, MOMENTS, GRADIENTS]},
    "bf16-context": {"family": "qwen3", "settings": [*CONTEXT, BF16, "model.recompute=full"]},
}
FP8_CASES = {
    f"fp8-{recipe}{name}": {
        "family": family,
        "settings": [*layout, SMALL, BF16, f"model.fp8={recipe}", "batching.pad_multiple=64"],
    }
    for recipe, name, family, layout in (
        ("blockwise", "", "qwen2", [*OVERLAPPED, FUSED]),
        ("blockwise", "-sequence", "qwen3", [*SEQUENCE, FUSED, *OFFLOADED]),
        ("blockwise", "-experts", "qwen3-moe-even", [*EXPERT, "model.recompute=[moe_act, layernorm]"]),
        ("tensorwise", "-sequence", "qwen2", [*SEQUENCE, FUSED]),
        ("tensorwise", "-experts", "qwen3-moe-even", [*EXPERT, *OVERLAPPED, "model.recompute=mlp"]),
    )
}
CASES = FP32_CASES | BF16_CASES | FP8_CASES
# What is broken in te_breaks.py, and a case in which it matters: one step is trained.
BROKEN_CASES = {
    "shard_marks": {"family": "qwen2-tied", "settings": TENSOR},
    "sequence_parallel_marks": {"family": "qwen3", "settings": SEQUENCE},
    "accumulation": {"family": "llama3-rope", "settings": [*TENSOR, FUSED]},
    "note_of_fused_gradients": {"family": "llama3-rope", "settings": [*TENSOR, FUSED]},
    "one_writer_of_main_grad": {"family": "qwen2-tied", "settings": [*TENSOR, FUSED]},
    # Here each rank computes other functions than it should, and not the gradients alone suffer.
    "context_rank": {"family": "qwen2-tied", "settings": CONTEXT, "finds": {"policy_loss", "grad_norm"}},
}
# One step on four ranks. Those that share a sequence are not neighbours: the tensor-parallel ranks are.
FOUR_RANK_CASES = {
    "context-sequence": {"family": "qwen3", "settings": [*SEQUENCE, *CONTEXT, *OVERLAPPED, FUSED]},
    "bf16-context-sequence": {"family": "qwen3", "settings": [*SEQUENCE, *CONTEXT, BF16]},
}
# Each model.attention is built, in the bf16 case of context parallelism, on a machine without a kernel for it, and each
# recipe of FP8 on a GPU before Hopper.
REFUSED = ("auto", "fused", "flash")
REFUSED_RECIPES = ("blockwise", "tensorwise")
# Not a case of training: the ring of keys and values alone. It comes last, as float64 is let in for it.
RING = "ring"
# One case of each kind of layout, precision and fault; the others are `long`.
CORE_CASES = (
    *("sequence", "pipeline-tied", "data-fused", "context", "experts"),
    *("bf16-context", "fp8-blockwise-sequence", "fp8-tensorwise-experts"),
    *("shard_marks", "accumulation", "context_rank"),
    *(f"refused-{what}" for what in (*REFUSED, *REFUSED_RECIPES)),
    RING,
)


def _others(*tables):
    return [name for table in tables for name in table if name not in CORE_CASES]


# What one start of the worker goes through: names of cases.
GROUPS_OF_CASES = {
    "core": list(CORE_CASES),
    "fp32": _others(FP32_CASES, BROKEN_CASES),
    "bf16": _others(BF16_CASES),
    "fp8": _others(FP8_CASES),
}


def objective_of(case):
    """The settings of a case that change what is computed, beside the model."""
    return [RECOMPUTE if BF16 in case["settings"] else ROLLOUT]


def config_of(folder, name, family, settings, layers="transformer_engine"):
    """The loaded configuration; its run folder is FOLDER/NAME."""
    settings = [*SETTINGS, f"model.layers={layers}", *settings, f"run.output_dir={folder / name}"]
    # Each rank writes its own file: another one may be reading.
    return run_config(folder / f"rank{os.environ.get('RANK', 0)}", folder / family, *settings)


def metrics_of(result):
    """The compared figures of one step."""
    return {key: result.metrics[key] for key in COMPARED}
