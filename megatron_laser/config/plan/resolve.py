"""The resolved run on a given number of ranks: what a dry run shows, from config.json and the YAML alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from megatron_laser.config.checks.layout import check_layout
from megatron_laser.config.checks.rollout import colocated_gpus
from megatron_laser.config.checks.settings import check_settings
from megatron_laser.config.derived import (
    micro_batch_tokens,
    needs_reference_model,
    padded_tokens,
)
from megatron_laser.config.model_folder.architecture import Architecture, read_architecture
from megatron_laser.config.model_folder.continuation import (
    continuation_problems,
    longest_trained,
    planned_ids,
)
from megatron_laser.config.model_folder.parameters import (
    Layout,
    RankBytes,
    count_parameters,
    padded_vocab_size,
    rank_bytes,
    stage_expert_parameters,
    stage_parameters,
)
from megatron_laser.config.model_folder.safetensors_headers import has_weight_files
from megatron_laser.config.model_folder.special_tokens import (
    ReadoutToken,
    ScoreToken,
    read_vocabulary,
    resolve_readout_tokens,
    resolve_score,
    resolve_stops,
)
from megatron_laser.config.model_folder.weight_checks import check_model_folder
from megatron_laser.config.plan.context import ContextShare, context_share
from megatron_laser.config.plan.features import Feature, run_features
from megatron_laser.config.plan.lines import Device, MemorySum
from megatron_laser.config.plan.memory import GPU_MEMORY_GIB, memory_sum
from megatron_laser.config.readouts import forced_text
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.stages import chunk_layers, layers_per_stage
from megatron_laser.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Batch arithmetic of one training step. Upper bounds assume that every sequence has the maximum length
    (and its padding for context parallelism) and that sequences are spread evenly over the data-parallel ranks."""

    prompts: int
    samples_per_prompt: int
    sequences: int  # of one rollout batch
    optimizer_steps: int  # per rollout batch
    sequences_per_optimizer_step: int
    sequences_per_rank: int  # per optimizer step, on the fullest data-parallel rank
    tokens_per_rank: int  # upper bound, per optimizer step; its context ranks share them
    micro_batches_per_rank: int  # upper bound, per optimizer step


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that follows from a configuration before a model is built."""

    config: RunConfig
    architecture: Architecture
    layout: Layout
    batch: BatchPlan
    parameters: int
    padded_vocab_size: int
    stage_parameters: tuple[int, ...]  # per rank of each pipeline stage
    bytes_per_rank: RankBytes  # of the biggest stage
    memory: MemorySum  # of the fullest rank, with activations and all else
    gpu_memory_gib: float
    context: ContextShare | None  # None without context parallelism
    features: tuple[Feature, ...]
    score_token: ScoreToken | None  # None while LaSeR is off
    readout_tokens: tuple[
        ReadoutToken, ...
    ]  # all that readouts read, the score token first; () while LaSeR is off
    device: Device = "cuda"  # what `memory` is the sum for


def resolve_plan(
    config: RunConfig,
    world_size: int | None = None,
    gpu_memory_gib: float = GPU_MEMORY_GIB,
    device: Device = "cuda",
) -> Plan:
    """Checks `config` against the model folder and `world_size` ranks and works out what will run.

    Needs only config.json in the folder; tokenizer files and the headers of weight files are read where they are.

    Args:
        config: the run.
        world_size: ranks; None: the fewest that the layout fits, or as many as colocated servers have GPUs.
        gpu_memory_gib: of one GPU; `plan.memory.check` compares, this function does not.
        device: what ranks train on. "cpu": over gloo, with torch's layers, and the sum is of tensors alone.

    Raises:
        ConfigError: no such model, an impossible layout, a token of a readout that cannot be one, or a forced text of
            readouts that cannot stand behind a response.
        ModelFolderError: the folder's weights are not those of its config.json, or cannot be used.
    """
    check_settings(config)
    architecture = read_architecture(config.model.path)
    if has_weight_files(config.model.path):
        check_model_folder(config.model.path)
    if world_size is None:
        parallel = config.parallel
        stage = math.lcm(parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor)
        world_size = colocated_gpus(config.rollout) or parallel.pipeline * stage
    check_layout(config, architecture, world_size)
    score_token, readout_tokens = _tokens(config, architecture)
    _check_continuation(config, architecture, readout_tokens)
    return Plan(
        architecture=architecture,
        parameters=count_parameters(architecture),
        gpu_memory_gib=gpu_memory_gib,
        score_token=score_token,
        readout_tokens=readout_tokens,
        device=device,
        **_laid_out(config, architecture, world_size, gpu_memory_gib, device),
    )


def another_layout(plan: Plan, config: RunConfig, world_size: int) -> Plan:
    """`resolve_plan(config, world_size, ...)` of the run of `plan` laid out in another way: nothing is read again.

    Args:
        config: differs from `plan.config` in what says how it runs, not in model, tokens or lengths.

    Raises:
        ConfigError: settings that do not go together, or an impossible layout.
    """
    check_settings(config)
    check_layout(config, plan.architecture, world_size)
    return replace(plan, **_laid_out(config, plan.architecture, world_size, plan.gpu_memory_gib, plan.device))


def _laid_out(
    config: RunConfig, architecture: Architecture, world_size: int, gpu_memory_gib: float, device: Device
) -> dict[str, Any]:
    """What of a `Plan` follows from how the run is laid out, by the names of its fields."""
    layout = _layout(config, architecture, world_size)
    stages = stage_parameters(architecture, layout, config.model.vocab_multiple)
    sizes, batch = _rank_bytes(config, architecture, layout, stages), _batch(config, layout)
    return {
        "config": config,
        "layout": layout,
        "batch": batch,
        "padded_vocab_size": padded_vocab_size(
            architecture.vocab_size, layout.tensor, config.model.vocab_multiple
        ),
        "stage_parameters": stages,
        "bytes_per_rank": max(sizes, key=lambda size: size.total),
        "memory": _memory(config, architecture, layout, sizes, batch, gpu_memory_gib, device),
        "context": context_share(config, architecture, batch.tokens_per_rank),
        "features": run_features(config),
    }


def _check_continuation(
    config: RunConfig, architecture: Architecture, tokens: tuple[ReadoutToken, ...]
) -> None:
    ids = planned_ids(config)
    if ids is None or not forced_text(config):
        return
    read = {one.token.id for one in tokens if one.token.id is not None}
    if problems := continuation_problems(config, architecture, ids, read):
        raise ConfigError(problems)


def resolve_memory(config: RunConfig, world_size: int, gpu_memory_gib: float) -> MemorySum:
    """`resolve_plan(...).memory` alone, for a configuration that has passed its checks; reads config.json, and
    tokenizer.json where readouts force a text."""
    architecture = read_architecture(config.model.path)
    layout = _layout(config, architecture, world_size)
    stages = stage_parameters(architecture, layout, config.model.vocab_multiple)
    sizes, batch = _rank_bytes(config, architecture, layout, stages), _batch(config, layout)
    return _memory(config, architecture, layout, sizes, batch, gpu_memory_gib, "cuda")


def resolve_rank_memory(
    config: RunConfig, world_size: int, *, device: Device, gpu_memory_gib: float = GPU_MEMORY_GIB
) -> tuple[MemorySum, ...]:
    """The sum for the ranks of each pipeline stage; checks and errors are those of `resolve_plan`."""
    plan = resolve_plan(config, world_size, gpu_memory_gib, device)
    stages, layout = plan.stage_parameters, plan.layout
    sizes = _rank_bytes(config, plan.architecture, layout, stages)
    return _stage_memory(config, plan.architecture, layout, sizes, plan.batch, gpu_memory_gib, device)


def _layout(config: RunConfig, architecture: Architecture, world_size: int) -> Layout:
    parallel = config.parallel
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        data=world_size // (parallel.tensor * parallel.pipeline * parallel.context),
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        stage_layers=layers_per_stage(chunk_layers(config, architecture), parallel.pipeline),
    )


def _rank_bytes(
    config: RunConfig, architecture: Architecture, layout: Layout, stages: tuple[int, ...]
) -> tuple[RankBytes, ...]:
    """Of a rank of each pipeline stage."""
    settings = config.optimizer
    return tuple(
        rank_bytes(
            parameters,
            config.model.dtype,
            shards=layout.data * layout.context if settings.distributed else 1,
            reference_model=needs_reference_model(config),
            expert_parameters=experts,
            expert_shards=layout.expert_data if settings.distributed else 1,
            gradient_dtype=settings.gradient_dtype,
            moments_dtype=settings.moments_dtype,
        )
        for parameters, experts in zip(stages, stage_expert_parameters(architecture, layout), strict=True)
    )


def _memory(
    config: RunConfig,
    architecture: Architecture,
    layout: Layout,
    sizes: tuple[RankBytes, ...],
    batch: BatchPlan,
    gpu_memory_gib: float,
    device: Device,
) -> MemorySum:
    """Of the fullest stage's ranks."""
    return max(
        _stage_memory(config, architecture, layout, sizes, batch, gpu_memory_gib, device),
        key=lambda memory: memory.total,
    )


def _stage_memory(
    config: RunConfig,
    architecture: Architecture,
    layout: Layout,
    sizes: tuple[RankBytes, ...],
    batch: BatchPlan,
    gpu_memory_gib: float,
    device: Device,
) -> tuple[MemorySum, ...]:
    return tuple(
        memory_sum(
            config,
            architecture,
            layout,
            stage,
            size,
            batch.micro_batches_per_rank,
            batch.tokens_per_rank,
            gpu_memory_gib,
            device,
        )
        for stage, size in enumerate(sizes)
    )


def _batch(config: RunConfig, layout: Layout) -> BatchPlan:
    rollout, policy = config.rollout, config.policy
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    per_step = sequences // policy.minibatches
    per_rank = -(-per_step // layout.data)
    longest = padded_tokens(longest_trained(config), config.parallel)
    fit = max(1, micro_batch_tokens(config) // longest)
    return BatchPlan(
        prompts=rollout.prompts_per_step,
        samples_per_prompt=rollout.samples_per_prompt,
        sequences=sequences,
        optimizer_steps=policy.minibatches * policy.epochs,
        sequences_per_optimizer_step=per_step,
        sequences_per_rank=per_rank,
        tokens_per_rank=per_rank * longest,
        micro_batches_per_rank=-(-per_rank // fit),
    )


def _tokens(
    config: RunConfig, architecture: Architecture
) -> tuple[ScoreToken | None, tuple[ReadoutToken, ...]]:
    """The score token, and those of all readouts."""
    stops = resolve_stops(config, architecture, complete=False)
    if not config.laser.enabled:
        resolve_score(config, architecture, stops, complete=False)
        return None, ()
    vocabulary = read_vocabulary(config.model.path)
    token = resolve_score(config, architecture, stops, vocabulary=vocabulary, complete=False)
    found, problems = resolve_readout_tokens(
        config, architecture, stops, vocabulary=vocabulary, complete=False
    )
    if problems:
        raise ConfigError(problems)
    return token, found
