"""What a training rank needs on its GPU, summed line by line from the configuration alone.

State (weights, gradients, optimizer) is exact. Activations are those of `plan/activations.py`, for one packed
micro-batch of `batching.tokens_per_micro_batch` tokens on a rank, times those in flight (`plan/update.py`). The head
keeps its input twice (gathered; labelled rows),
works in tiles, and keeps probabilities for its backward: as many bytes as set, or by the rule that the op itself
applies (`logprob_memory.py`), from what all other lines leave. What context parallelism adds is in `plan/context.py`.
CUDA's context, libraries and the caching allocator are allowances, not arithmetic: see the constants.
"""

from __future__ import annotations

from megatron_laser.config.derived import longest_sequence
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.parameters import (
    DTYPE_BYTES,
    Layout,
    RankBytes,
    count_parameters,
    padded_vocab_size,
    stage_matrices,
)
from megatron_laser.config.model_folder.quantized import quantized_bytes
from megatron_laser.config.plan.context import ring_neighbours
from megatron_laser.config.plan.cpu import cpu_lines, cpu_step_lines
from megatron_laser.config.plan.lines import (
    GENERATE,
    HEAD,
    HOST,
    SAVE,
    STATE,
    STEP,
    SYNC,
    UPDATE,
    Device,
    MemoryLine,
    MemorySum,
    gib,
)
from megatron_laser.config.plan.update import kept_lines, update_lines
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.server_options import server_option
from megatron_laser.logprob_memory import GIB, MIB

# An H100 of 80 GB shows so much.
GPU_MEMORY_GIB = 79.1
CONTEXT_BYTES = 768 * MIB  # CUDA context with kernels, cuBLAS and cuDNN workspaces
COMMUNICATOR_BYTES = 400 * MIB  # NCCL's channels and buffers, for each group of more than one rank
SERVER_REST_BYTES = 2 * GIB  # a colocated server whose pools are released: context and graphs
ALLOCATOR_SHARE = 0.05  # of what torch allocates, lost between blocks
SAVE_CHUNK_BYTES = 64 * MIB  # trainer/checkpoint/sharded_state.py
MEM_FRACTION_STATIC = 0.85  # of a colocated server, where its options do not say


def memory_sum(
    config: RunConfig,
    architecture: Architecture,
    layout: Layout,
    stage: int,
    size: RankBytes,
    micro_batches: int,
    replica_tokens: int,
    gpu_memory_gib: float = GPU_MEMORY_GIB,
    device: Device = "cuda",
) -> MemorySum:
    """The sum for one rank of pipeline stage `stage`. Pure.

    Args:
        size: weights, gradients and optimizer state of this rank.
        micro_batches, replica_tokens: of one optimizer step on a data-parallel replica, at most. Its context ranks
            share the tokens.
        gpu_memory_gib: what a colocated server's `mem_fraction_static` is a fraction of, and what the log-prob op
            may keep is chosen from.
        device: "cpu": the sum of `plan/cpu.py`, of tensors alone.
    """
    state = _state(config, architecture, layout, size)
    if device == "cpu":
        lines = [
            *state,
            *cpu_lines(config, architecture, layout, stage, micro_batches, replica_tokens),
            *cpu_step_lines(config, architecture, layout, stage, size),
        ]
        if config.rollout.engine == "in_process":
            lines += _rollout(config, architecture, layout, state, gpu_memory_gib)
        return MemorySum(tuple(lines))
    lines = [
        *state,
        MemoryLine(
            "CUDA context, cuBLAS, cuDNN", CONTEXT_BYTES, STATE, "an allowance", "none: a smaller model"
        ),
    ]
    if config.model.fp8 != "none":
        # Cast once an optimizer step: as the forward reads them, and turned, as the backward does.
        copies = 3 if size.reference_model else 2  # a reference model has the first one alone
        cast = copies * stage_matrices(architecture, layout)[stage]
        detail = f"{copies} copies of the layers' matrices"
        lines.append(MemoryLine("weights in FP8", cast, STATE, detail, "model.fp8"))
    reducing = layout.data * layout.context  # gradients and optimizer shards are over both
    sizes = [layout.tensor, layout.pipeline, layout.context, reducing, layout.world_size]
    if architecture.moe is not None:
        sizes += [layout.expert, layout.expert_tensor, layout.expert_data]
    groups = sum(size > 1 for size in sizes) + ring_neighbours(config)
    if groups:
        detail = f"{groups} groups of {COMMUNICATOR_BYTES // MIB} MiB, an allowance"
        lines.append(MemoryLine("NCCL", groups * COMMUNICATOR_BYTES, STATE, detail, "NCCL_BUFFSIZE"))
    lines += update_lines(config, architecture, layout, stage, micro_batches, replica_tokens)
    lines += _step(config, size)
    if config.optimizer.distributed and reducing > 1:
        lines.append(
            MemoryLine(
                "save: buffer", SAVE_CHUNK_BYTES, SAVE, "64 MiB of float32, gathered", "none: constant"
            )
        )
    lines += _rollout(config, architecture, layout, state, gpu_memory_gib)
    there = sum(line.bytes for line in lines if line.phase in (STATE, UPDATE))
    outside = CONTEXT_BYTES + groups * COMMUNICATOR_BYTES
    if any(line.name == HEAD for line in lines):
        free = int(gpu_memory_gib * GIB) - there - int(ALLOCATOR_SHARE * (there - outside))
        kept = kept_lines(config, architecture, layout, replica_tokens, free, int(gpu_memory_gib * GIB))
        lines += kept
        there += sum(line.bytes for line in kept)
    lines.append(
        MemoryLine(
            "caching allocator",
            int(ALLOCATOR_SHARE * (there - outside)),
            UPDATE,
            f"{ALLOCATOR_SHARE:.0%} of what torch allocates, an allowance",
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        )
    )
    return MemorySum(tuple(lines))


def _state(
    config: RunConfig, architecture: Architecture, layout: Layout, size: RankBytes
) -> list[MemoryLine]:
    split, sharded = "parallel.tensor, parallel.pipeline", "not sharded"
    if architecture.moe is not None:
        split += ", parallel.expert"
    if config.optimizer.distributed:
        sharded = f"sharded over {layout.data * layout.context}"
        if architecture.moe is not None:
            sharded += f", experts' over {layout.expert_data}"
    settings, away = config.optimizer, config.optimizer.offload
    if settings.moments_dtype != "float32":
        sharded += f", moments in {settings.moments_dtype}"
    if away:
        sharded += ", in host memory but for the step"
    cures = f"optimizer.distributed, optimizer.offload, more ranks, {split}"
    lines = [
        MemoryLine("weights", size.weights, STATE, config.model.dtype, split),
        MemoryLine("gradients", size.gradients, STATE, settings.gradient_dtype, split),
        MemoryLine("optimizer", size.optimizer, STEP if away else STATE, sharded, cures),
    ]
    if away:
        lines.append(MemoryLine("save: optimizer", size.optimizer, SAVE, "brought back to be saved", cures))
        lines.append(MemoryLine("optimizer", size.optimizer, HOST, "page-locked", "optimizer.offload"))
    if size.reference_model:
        lines.append(
            MemoryLine("reference model", size.reference_model, STATE, "frozen", "policy.kl_coefficient")
        )
    return lines


def _step(config: RunConfig, size: RankBytes) -> list[MemoryLine]:
    """What the update takes besides the state."""
    settings = config.optimizer
    if settings.gradient_dtype == "float32" or settings.moments_dtype != "float32":
        return []  # float32 gradients are used where they lie; Transformer Engine's optimizer reads bfloat16 ones
    main = size.optimizer // 3  # as many bytes as the float32 weights
    return [
        MemoryLine("gradients in float32", main, STEP, "of this rank's share", "optimizer.gradient_dtype")
    ]


def _rollout(
    config: RunConfig, arch: Architecture, layout: Layout, state: list[MemoryLine], gpu_memory_gib: float
) -> list[MemoryLine]:
    rollout, itemsize = config.rollout, DTYPE_BYTES[config.model.dtype]
    if rollout.engine == "none":
        return []
    if rollout.engine == "in_process":
        # Keys and values of every sequence at its longest; the copy of the model has no tensor parallelism.
        width = arch.num_key_value_heads * arch.head_dim
        cache = 2 * arch.num_layers * width * itemsize * rollout.max_batch_size * longest_sequence(config)
        detail = f"keys and values of {rollout.max_batch_size} sequences, on rank 0"
        copy = count_parameters(arch) * itemsize
        return [
            MemoryLine("in-process engine: model", copy, STATE, "a whole copy, on rank 0", "rollout.engine"),
            MemoryLine("in-process engine: cache", cache, GENERATE, detail, "rollout.max_batch_size"),
        ]
    lines = []
    bucket = rollout.sync_bucket_mib * MIB
    table = itemsize * padded_vocab_size(arch.vocab_size, layout.tensor, config.model.vocab_multiple)
    largest = table * arch.hidden_size
    if rollout.weight_sync != "disk":
        lines.append(
            MemoryLine("sync: buckets", 2 * bucket, SYNC, "two, on rank 0", "rollout.sync_bucket_mib")
        )
    detail = "shards and the whole of the largest, on rank 0"
    gathered = 2 * largest if layout.tensor > 1 else 0
    lines.append(MemoryLine("sync: gathered parameter", gathered, SYNC, detail, "none: the vocabulary"))
    if rollout.weight_sync == "colocated":
        lines.append(
            MemoryLine(
                "colocated server", SERVER_REST_BYTES, STATE, "its pools released", "rollout.weight_sync"
            )
        )
        lines += _colocated_phases(config, arch, state, gpu_memory_gib)
    return lines


def _colocated_phases(
    config: RunConfig, arch: Architecture, state: list[MemoryLine], gpu_memory_gib: float
) -> list[MemoryLine]:
    """What colocated servers hold while the trainer's state is in host memory, in excess of that state."""
    sglang = config.rollout.sglang
    given = server_option(sglang.options, "mem_fraction_static", None)
    fraction = MEM_FRACTION_STATIC if given is None else float(given)
    pools = int(fraction * gpu_memory_gib * GIB)
    dtype_bytes = DTYPE_BYTES[config.model.dtype]
    held = quantized_bytes(arch, dtype_bytes) if sglang.quantization else count_parameters(arch) * dtype_bytes
    weights = held // sglang.tensor
    away = sum(line.bytes for line in state if line.phase == STATE)
    kept = state[0].bytes  # a sync needs the trainer's weights
    return [
        MemoryLine(
            "colocated server's pools",
            max(0, pools - away),
            GENERATE,
            f"{gib(pools)} less the trainer's state, which is away",
            "rollout.sglang.options.mem_fraction_static",
        ),
        MemoryLine(
            "colocated server's weights",
            max(0, weights - (away - kept)),
            SYNC,
            f"{gib(weights)} less gradients and optimizer, which are away",
            "rollout.sglang.tensor",
        ),
    ]
