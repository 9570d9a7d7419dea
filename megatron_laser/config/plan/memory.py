"""What a training rank needs on its GPU, summed line by line from the configuration alone.

State (weights, gradients, optimizer) is exact. Activations are those of `plan/activations.py`, for one packed
micro-batch of `batching.tokens_per_micro_batch` tokens on a rank; in flight are `pipeline` micro-batches on the first
stage (Narayanan et al. 2021, section 2.2), one on the last. The head keeps its input twice (gathered; labelled rows),
works in tiles, and keeps probabilities for its backward: as many bytes as set, or by the rule that the op itself
applies (`logprob_memory.py`), from what all other lines leave. What context parallelism adds is in `plan/context.py`.
CUDA's context, libraries and the caching allocator are allowances, not arithmetic: see the constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laser.config.derived import longest_sequence
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.parameters import (
    DTYPE_BYTES,
    Layout,
    RankBytes,
    count_parameters,
    padded_vocab_size,
)
from megatron_laser.config.plan.activations import inside_mlp, layer_activation_bytes
from megatron_laser.config.plan.context import attention_bytes, rank_tokens, ring_neighbours
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.server_options import server_option
from megatron_laser.errors import ConfigError
from megatron_laser.logprob_memory import GIB, MIB, TILE_BYTES, choose_keep_budget

STATE, UPDATE, SAVE, SYNC, GENERATE = "state", "update", "save", "sync", "generate"

# An H100 of 80 GB shows so much.
GPU_MEMORY_GIB = 79.1
CONTEXT_BYTES = 768 * MIB  # CUDA context with kernels, cuBLAS and cuDNN workspaces
COMMUNICATOR_BYTES = 400 * MIB  # NCCL's channels and buffers, for each group of more than one rank
SERVER_REST_BYTES = 2 * GIB  # a colocated server whose pools are released: context and graphs
ALLOCATOR_SHARE = 0.05  # of what torch allocates, lost between blocks
SAVE_CHUNK_BYTES = 64 * MIB  # trainer/checkpoint/sharded_state.py
STEP_BYTES_PER_TOKEN = 56  # ids, positions, labels, log-probs, weights of a step's micro-batches
MEM_FRACTION_STATIC = 0.85  # of a colocated server, where its options do not say
HEAD, KEPT = "log-prob head", "kept probabilities"


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One part: `phase` is "state" (always there) or when it exists; `settings` change it."""

    name: str
    bytes: int
    phase: str
    detail: str
    settings: str


@dataclass(frozen=True, slots=True)
class MemorySum:
    """All lines of the fullest rank."""

    lines: tuple[MemoryLine, ...]

    def phase_bytes(self, phase: str) -> int:
        """Sum of the lines of one phase."""
        return sum(line.bytes for line in self.lines if line.phase == phase)

    @property
    def peak_phase(self) -> str:
        """The phase with the most memory."""
        return max((UPDATE, SAVE, SYNC, GENERATE), key=self.phase_bytes)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment: the state and the largest phase, one at a time."""
        return self.phase_bytes(STATE) + self.phase_bytes(self.peak_phase)

    def check(self, gpu_bytes: float) -> None:
        """Raises ConfigError when the total is more than `gpu_bytes`; names the largest lines and their settings."""
        if self.total <= gpu_bytes:
            return
        there = [line for line in self.lines if line.phase in (STATE, self.peak_phase)]
        largest = sorted(there, key=lambda line: -line.bytes)[:3]
        raise ConfigError(
            [
                f"memory: a rank needs {gib(self.total)} ({self.peak_phase}) and the GPU has {gib(gpu_bytes)}. "
                "Largest: "
                + "; ".join(f"{line.name} {gib(line.bytes)} ({line.settings})" for line in largest)
            ]
        )


def gib(count: float) -> str:
    """Bytes in the unit that keeps three digits: GiB for models, MiB and KiB for toys."""
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def memory_sum(
    config: RunConfig,
    architecture: Architecture,
    layout: Layout,
    size: RankBytes,
    micro_batches: int,
    replica_tokens: int,
    gpu_memory_gib: float = GPU_MEMORY_GIB,
) -> MemorySum:
    """The sum for one rank. Pure.

    Args:
        size: weights, gradients and optimizer state of the fullest rank.
        micro_batches, replica_tokens: of one optimizer step on a data-parallel replica, at most. Its context ranks
            share the tokens.
        gpu_memory_gib: what a colocated server's `mem_fraction_static` is a fraction of, and what the log-prob op
            may keep is chosen from.
    """
    state = _state(config, architecture, layout, size)
    lines = [
        *state,
        MemoryLine(
            "CUDA context, cuBLAS, cuDNN", CONTEXT_BYTES, STATE, "an allowance", "none: a smaller model"
        ),
    ]
    reducing = layout.data * layout.context  # gradients and optimizer shards are over both
    sizes = [layout.tensor, layout.pipeline, layout.context, reducing, layout.world_size]
    if architecture.moe is not None:
        sizes += [layout.expert, layout.expert_tensor, layout.expert_data]
    groups = sum(size > 1 for size in sizes) + ring_neighbours(config)
    if groups:
        detail = f"{groups} groups of {COMMUNICATOR_BYTES // MIB} MiB, an allowance"
        lines.append(MemoryLine("NCCL", groups * COMMUNICATOR_BYTES, STATE, detail, "NCCL_BUFFSIZE"))
    lines += _update(config, architecture, layout, micro_batches, replica_tokens)
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
        kept = _kept(config, architecture, layout, replica_tokens, free, int(gpu_memory_gib * GIB))
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
    lines = [
        MemoryLine("weights", size.weights, STATE, config.model.dtype, split),
        MemoryLine("gradients", size.gradients, STATE, "float32", split),
        MemoryLine(
            "optimizer", size.optimizer, STATE, sharded, f"optimizer.distributed, more ranks, {split}"
        ),
    ]
    if size.reference_model:
        lines.append(
            MemoryLine("reference model", size.reference_model, STATE, "frozen", "policy.kl_coefficient")
        )
    return lines


def _update(
    config: RunConfig, arch: Architecture, layout: Layout, micro_batches: int, replica_tokens: int
) -> list[MemoryLine]:
    tokens = rank_tokens(config, replica_tokens)
    itemsize = DTYPE_BYTES[config.model.dtype]
    recompute, t = config.model.recompute, layout.tensor
    kept, anew = layer_activation_bytes(
        arch,
        tokens=tokens,
        itemsize=itemsize,
        tensor=t,
        sequence=config.parallel.sequence,
        recompute=recompute,
        expert_tensor=layout.expert_tensor,
    )
    context = attention_bytes(config, arch, tokens)
    if recompute == "full":
        anew += context.kept
    else:
        kept += context.kept
    p, v = layout.pipeline, layout.virtual_pipeline
    layers = arch.num_layers // p
    # Interleaving starts (p - 1) / v further micro-batches' worth of chunks (Narayanan et al. 2021, section 2.2).
    flight = min(float(micro_batches), p if v == 1 else p + (p - 1) / v)
    first = int(kept * layers * flight)
    head = _head(config, arch, layout, tokens, itemsize)
    last = kept * layers + sum(line.bytes for line in head)
    if config.model.keep_logits_gib is not None:
        whole = _probabilities(config, arch, layout, replica_tokens)
        last += min(round(config.model.keep_logits_gib * GIB), whole)
    if p > 1 and first >= last:
        head, stage = [], "the first stage"
    else:
        first, flight, stage = (first, flight, "") if p == 1 else (kept * layers, 1.0, "the last stage")
    unit = itemsize * tokens
    transient = unit * 2 * arch.hidden_size + inside_mlp(arch, unit, t, layout.expert_tensor) + anew
    budget = "model.recompute, batching.tokens_per_micro_batch, parallel.sequence, parallel.context"
    each = f"{layers} layers x {gib(kept)}" + (f" x {flight:g} in flight" if flight > 1 else "")
    where = f" on each of {layout.context} context ranks" if layout.context > 1 else ""
    own = -(-replica_tokens // layout.context)
    lines = [
        MemoryLine(
            "activations",
            first,
            UPDATE,
            f"{each}, recompute {recompute}, {tokens:,} tokens{where}" + (f", {stage}" if stage else ""),
            budget,
        ),
        MemoryLine("one layer's backward", transient, UPDATE, "gathered inputs, gradients", budget),
        *head,
        MemoryLine(
            "the step's micro-batches",
            STEP_BYTES_PER_TOKEN * own,
            UPDATE,
            f"at most {own:,} tokens",
            "rollout.prompts_per_step, policy.minibatches",
        ),
    ]
    if config.moe.routing_replay and arch.moe is not None:
        share = t if config.parallel.sequence else 1
        width = layers * arch.moe.experts_per_token * (1 if arch.moe.num_experts <= 256 else 2)
        lines.append(
            MemoryLine(
                "routing replay",
                width * own // share,
                UPDATE,
                f"{width} bytes for each of at most {own // share:,} tokens, of this stage's layers",
                "moe.routing_replay, policy.minibatches, rollout.prompts_per_step",
            )
        )
    if context.buffers:
        detail = f"keys, values and gradients of {layout.context} context ranks, one layer at a time"
        lines.append(MemoryLine("context attention", context.buffers, UPDATE, detail, budget))
    return lines


def _head(
    config: RunConfig, arch: Architecture, layout: Layout, tokens: int, itemsize: int
) -> list[MemoryLine]:
    tile = min(TILE_BYTES, 4 * tokens * _columns(config, arch, layout))
    hidden = arch.hidden_size * tokens
    return [
        MemoryLine(
            HEAD,
            3 * itemsize * hidden + 4 * hidden + tile + tile * itemsize // 4,
            UPDATE,
            "input twice and scaled, dX in float32, a tile of logits and its gradient",
            "batching.tokens_per_micro_batch",
        )
    ]


def _probabilities(config: RunConfig, arch: Architecture, layout: Layout, replica_tokens: int) -> int:
    """Bytes of all probabilities of a micro-batch's tokens on one rank, which has one shard of the vocabulary."""
    tokens = rank_tokens(config, replica_tokens)
    return DTYPE_BYTES[config.model.dtype] * tokens * _columns(config, arch, layout)


def _kept(
    config: RunConfig, arch: Architecture, layout: Layout, replica_tokens: int, free: int, total: int
) -> list[MemoryLine]:
    """What the head keeps for its backward when all other lines leave `free` of the GPU's `total` bytes."""
    whole = _probabilities(config, arch, layout, replica_tokens)
    setting = config.model.keep_logits_gib
    if setting == 0:
        return []
    budget = choose_keep_budget(free, total) if setting is None else round(setting * GIB)
    how = "chosen from what is free" if setting is None else "as set"
    kept = min(budget, whole)
    if kept == whole:
        rest = f"all of them in {config.model.dtype}"
    elif kept:
        rest = f"{kept / whole:.0%} of {gib(whole)}; the loss in blocks of rows, or the rest recomputed"
    else:
        rest = f"none of {gib(whole)}, all recomputed"
    return [MemoryLine(KEPT, kept, UPDATE, f"{how}: {rest}", "model.keep_logits_gib")]


def _columns(config: RunConfig, arch: Architecture, layout: Layout) -> int:
    """Of a rank's shard of the padded vocabulary."""
    return padded_vocab_size(arch.vocab_size, layout.tensor, config.model.vocab_multiple) // layout.tensor


def _rollout(
    config: RunConfig, arch: Architecture, layout: Layout, state: list[MemoryLine], gpu_memory_gib: float
) -> list[MemoryLine]:
    rollout, itemsize = config.rollout, DTYPE_BYTES[config.model.dtype]
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
    weights = count_parameters(arch) * DTYPE_BYTES[config.model.dtype] // sglang.tensor
    away = sum(line.bytes for line in state)
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
