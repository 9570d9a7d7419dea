"""Whether a model fits the lengths and the split of a run, and the run its number of ranks."""

from __future__ import annotations

from megatron_laser.config.checks.memory import model_memory_problems
from megatron_laser.config.checks.rollout import colocated_layout_problems, deadline_problems
from megatron_laser.config.derived import evaluation_max_new_tokens, shared_prompt_problems
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.quantized import block_problems
from megatron_laser.config.modes import profiled_rank_problems
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.schema.system import ParallelConfig
from megatron_laser.errors import ConfigError


def check_layout(config: RunConfig, architecture: Architecture, world_size: int) -> None:
    """Raises ConfigError with everything that `layout_problems` finds."""
    if problems := layout_problems(config, architecture, world_size):
        raise ConfigError(problems)


def layout_problems(config: RunConfig, architecture: Architecture, world_size: int) -> list[str]:
    """Problems of this model on this many ranks; one line each, with the arithmetic."""
    parallel = config.parallel
    problems = split_problems(config, architecture)
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    label = f"parallel.tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} ="
    if world_size < 1:
        problems.append(f"world size {world_size}: expected 1 or more")
    elif world_size % model_ranks:
        problems += divisible("world size", world_size, label, model_ranks)
    else:
        problems += _share_problems(config, world_size, model_ranks)
        stage = world_size // parallel.pipeline
        label = f"parallel.expert {parallel.expert} x expert_tensor {parallel.expert_tensor} ="
        problems += divisible(
            "a pipeline stage's ranks", stage, label, parallel.expert * parallel.expert_tensor
        )
        problems += colocated_layout_problems(config.rollout, world_size)
        problems += deadline_problems(config, world_size)
        problems += profiled_rank_problems(config, world_size)
    problems += position_problems(config, architecture)
    sglang = config.rollout.sglang
    if config.rollout.engine == "sglang" and sglang.quantization is not None:
        problems += block_problems(architecture, sglang.tensor)
    return problems


def split_problems(config: RunConfig, architecture: Architecture) -> list[str]:
    """Parts of this model that `parallel.tensor` and the pipeline do not divide, on any number of ranks."""
    parallel = config.parallel
    problems = []
    parts = [
        ("num_attention_heads", architecture.num_attention_heads),
        ("num_key_value_heads", architecture.num_key_value_heads),
        ("hidden_size", architecture.hidden_size),
    ]
    if architecture.moe is None:
        parts.append(("intermediate_size", architecture.intermediate_size))
    for name, value in parts:
        problems += divisible(name, value, "parallel.tensor", parallel.tensor)
    problems += _expert_problems(config, architecture)
    problems += stage_problems(parallel, architecture.num_layers)
    problems += model_memory_problems(config, architecture)
    if config.batching.share_prompts:
        reasons = shared_prompt_problems(config, experts=architecture.moe is not None)
        problems += [
            f"batching.share_prompts: true, but {reason}; leave it null or set it to false"
            for reason in reasons
        ]
    return problems


def stage_problems(parallel: ParallelConfig, layers: int) -> list[str]:
    """Why a model of so many layers cannot be cut as `parallel` says; one line each, with the arithmetic."""
    wanted, chunks = parallel.stage_layers, parallel.pipeline * parallel.virtual_pipeline
    label = f"parallel.pipeline {parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline} ="
    if parallel.virtual_pipeline == 1:
        label = "parallel.pipeline"
    if wanted == "even":
        cure = "; set parallel.stage_layers to balanced, or to the number of layers of each"
        return [problem + cure for problem in divisible("num_hidden_layers", layers, label, chunks)]
    if wanted == "balanced":
        short = f"num_hidden_layers {layers} is less than {label} {chunks}: some would have none"
        return [short] if layers < chunks else []
    problems = []
    if len(wanted) != chunks:
        problems.append(
            f"parallel.stage_layers has {len(wanted)} numbers: expected one for each of {label} {chunks}"
        )
    if sum(wanted) != layers:
        problems.append(
            f"parallel.stage_layers: {' + '.join(map(str, wanted))} = {sum(wanted)}, and num_hidden_layers is {layers}"
        )
    return problems


def _expert_problems(config: RunConfig, architecture: Architecture) -> list[str]:
    """What a model with experts needs, and a dense one cannot be asked for."""
    parallel, moe = config.parallel, architecture.moe
    if moe is None:
        asked = [
            f"{section}.{name}: {value}"
            for section, values in (("parallel", parallel), ("moe", config.moe))
            for name, value in values
            if (section == "moe" or name.startswith("expert"))
            and value != type(values).model_fields[name].default
        ]
        return [f"{setting}, but a {architecture.model_type} model has no experts" for setting in asked]
    problems = divisible("the number of experts", moe.num_experts, "parallel.expert", parallel.expert)
    problems += divisible(
        "an expert's intermediate size",
        moe.intermediate_size,
        "parallel.expert_tensor",
        parallel.expert_tensor,
    )
    if parallel.tensor > 1 and not parallel.sequence:
        problems.append(
            f"parallel.tensor: {parallel.tensor} with experts needs parallel.sequence: true, so that each of these "
            "ranks sends tokens of its own to them"
        )
    for name in ("aux_loss_coefficient", "z_loss_coefficient"):
        if config.moe.freeze_router and getattr(config.moe, name):
            problems.append(
                f"moe.{name}: {getattr(config.moe, name)} with moe.freeze_router would change everything but the "
                "routers that it is for; set one of them only"
            )
    return problems


def position_problems(config: RunConfig, architecture: Architecture) -> list[str]:
    """Longest sequences for which the model has no positions; one line each, with the arithmetic.

    The padding of context parallelism does not count: up to 2 x `parallel.context` - 1 positions beyond the limit, on
    tokens that no other token attends to and that have no label. Rotary angles are computed for any position.
    """
    limit = architecture.max_position_embeddings
    problems = []
    prompt = config.data.max_prompt_tokens
    for name, new in (
        ("rollout.max_new_tokens", config.rollout.max_new_tokens),
        ("evaluation.max_new_tokens", evaluation_max_new_tokens(config)),
    ):
        if name.startswith("evaluation") and config.evaluation.max_new_tokens is None:
            continue  # the rollout's, said already
        if prompt + new > limit:
            problems.append(
                f"data.max_prompt_tokens {prompt} + {name} {new} = {prompt + new} is more than the model's "
                f"max_position_embeddings {limit}"
            )
    return problems


def divisible(name: str, value: int, divisor_name: str, divisor: int) -> list[str]:
    """[] where `divisor` divides `value`; else one line with the arithmetic."""
    rest = value % divisor
    if rest == 0:
        return []
    return [f"{name} {value} is not divisible by {divisor_name} {divisor}: {value} % {divisor} = {rest}"]


def _share_problems(config: RunConfig, world_size: int, model_ranks: int) -> list[str]:
    rollout, policy = config.rollout, config.policy
    data_parallel = world_size // model_ranks
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt // policy.minibatches
    if sequences >= data_parallel:
        return []
    return [
        f"rollout.prompts_per_step {rollout.prompts_per_step} x rollout.samples_per_prompt "
        f"{rollout.samples_per_prompt} / policy.minibatches {policy.minibatches} = {sequences} sequences per "
        f"optimizer step, fewer than the data-parallel size {world_size} / {model_ranks} = {data_parallel}: some ranks "
        "would never train"
    ]
