"""What a step takes on a rank that trains on a CPU over gloo: torch's layers, and tensors alone.

There is no CUDA context, no NCCL and no caching allocator; gloo's own buffers are not tensors. What torch's layers keep
for the backward was read off their saved tensors (`benchmarks/memory.py` measures the whole). With T tokens, h hidden
size, q, k widths of queries and keys, n_q, n_k their heads, f MLP width, t tensor size, s = t with `parallel.sequence`
and else 1, b bytes a number, of each layer:

    norm       T (8 h + 4 + b h) / s, twice: its input and the normalised one in float32, a root, and its output
    attention  T (b (3 q + 2 k) + 4 n_q) / t: padded queries, keys, values and output; the packed output; log-sum-exps
      shared   T (b (3 q + 3 k) + 4 n_q) / t where prompts are shared: values stay views of the projection
      Qwen3    T (4 (2 q + 2 k) + 4 (n_q + n_k)) / t for the norms of queries and keys, and in float32 the projection
    MLP        5 b T f / t: both halves, one of them again with an offset of 0 added, its activation, their product
    experts    c T (b (e h + 6 f) + 4) / t + T (12 E + 16 c) / s: a token on c experts of E; the router's choice

One layer's backward frees what was kept as it goes: beside the kept, the gradients of the MLP's halves and of its
output are there at once. Neither that nor the head is there when the other is, and both are over when the embedding's
gradient, as large as its table, is made, and when gradients are scattered, of which gloo makes a copy.
"""

from __future__ import annotations

from megatron_laser.config.derived import recompute_words, shared_prompt_problems
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.parameters import (
    DTYPE_BYTES,
    Layout,
    RankBytes,
    padded_vocab_size,
    stage_expert_parameters,
    stage_parameters,
)
from megatron_laser.config.plan.context import attention_bytes, rank_tokens
from megatron_laser.config.plan.head_rows import extra_rows
from megatron_laser.config.plan.lines import HEAD, KEPT, STATE, STEP, UPDATE, MemoryLine, gib
from megatron_laser.config.plan.update import STEP_BYTES_PER_TOKEN, in_flight
from megatron_laser.config.schema.inputs import Recompute
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.logprob_memory import CPU_TILE_BYTES, GIB, KEEP_CPU_BYTES

LAYOUT_BYTES_PER_TOKEN = 32  # four indexes of padded batches, kept with each micro-batch
RANDOM_STATE_BYTES = 5056  # torch's, saved for every layer that is run again
# A tile of logits, which becomes their product with their exponentials for the entropy, these, and where they are 0.
_FORWARD_TILES = 2.25


def shares_prompts(config: RunConfig, arch: Architecture) -> bool:
    """Whether a CPU rank packs a group's prompt once."""
    return config.batching.share_prompts is not False and not shared_prompt_problems(
        config, experts=arch.moe is not None
    )


def layer_bytes(
    config: RunConfig, arch: Architecture, layout: Layout, tokens: int, recompute: Recompute
) -> tuple[int, int]:
    """(kept of each layer, made anew for one layer in the backward): the module's formulas."""
    b, h, t = DTYPE_BYTES[config.model.dtype], arch.hidden_size, layout.tensor
    s = t if config.parallel.sequence else 1
    heads, kv_heads = arch.num_attention_heads, arch.num_key_value_heads
    q, k = heads * arch.head_dim, kv_heads * arch.head_dim
    attention = packed = b * (3 * q + 3 * k) + 4 * heads
    projection, shares = b * (q + 2 * k), shares_prompts(config, arch)
    if config.parallel.context > 1:
        attention = 3 * b * q + 4 * heads
    elif not shares:
        attention = b * (3 * q + 2 * k) + 4 * heads
    core = tokens * attention // t + attention_bytes(config, arch, tokens).kept
    if arch.qk_norm:
        attention += 4 * (2 * q + 2 * k) + 4 * (heads + kv_heads)
        if b == 4:
            # In float32 the keys' norm keeps a view of the projection, and no input of its own.
            attention += (0 if shares else projection) - 4 * k
    mlp = _mlp(arch, layout, tokens, b, s)
    kept_attention = tokens * attention // t + attention_bytes(config, arch, tokens).kept
    whole = 2 * tokens * (8 * h + 4 + b * h) // s + kept_attention + mlp
    if recompute == "full":
        kept = tokens * b * h // s + RANDOM_STATE_BYTES
        return kept, whole - kept
    kept, anew = whole, 0
    if "mlp" in recompute:
        kept, anew = kept - mlp + RANDOM_STATE_BYTES, mlp
    if "core_attn" in recompute:
        # Instead of what the attention keeps: its packed inputs, values as a view of the projection, and its output for
        # the projection behind it. Without context parallelism that is more.
        kept, anew = kept - core + tokens * (packed - 4 * heads) // t + RANDOM_STATE_BYTES, anew + core
    return kept, anew


def _mlp(arch: Architecture, layout: Layout, tokens: int, b: int, s: int) -> int:
    moe = arch.moe
    if moe is None:
        return 5 * b * tokens * arch.intermediate_size // layout.tensor
    count, width = moe.experts_per_token, layout.expert_tensor * arch.hidden_size
    inside = tokens * count * (b * (width + 6 * moe.intermediate_size) + 4) // layout.tensor
    return inside + tokens * (12 * moe.num_experts + 16 * count) // s


def cpu_lines(
    config: RunConfig,
    arch: Architecture,
    layout: Layout,
    stage: int,
    micro_batches: int,
    replica_tokens: int,
) -> list[MemoryLine]:
    """What the forward and backward passes of an optimizer step take on a rank of pipeline stage `stage`."""
    model, b, t, p = config.model, DTYPE_BYTES[config.model.dtype], layout.tensor, layout.pipeline
    s = t if config.parallel.sequence else 1
    tokens, h = rank_tokens(config, replica_tokens), arch.hidden_size
    kept, anew = layer_bytes(config, arch, layout, tokens, model.recompute)
    layers, flight = layout.layers(arch.num_layers)[stage], in_flight(layout, stage, micro_batches)
    plain = 0
    if model.recompute == "full" and model.recompute_layers is not None:
        plain = max(0, layers - model.recompute_layers * layout.virtual_pipeline)
    of_plain = layer_bytes(config, arch, layout, tokens, "none")[0]
    sent = tokens * b * h // s if stage < p - 1 else 0  # kept for its gradient, as the schedule has it
    activations = int(flight * (kept * (layers - plain) + of_plain * plain + sent))
    head, probabilities = _head(config, arch, layout, tokens, replica_tokens) if stage == p - 1 else (0, 0)
    # Largest of a layer's matrices whose gradient is there beside what is not freed yet.
    f = arch.intermediate_size if arch.moe is None else arch.moe.intermediate_size
    width = f if arch.moe is None else f * arch.moe.experts_per_token
    halves, matrix = 2 * b * tokens * width // t, 2 * b * f * h // t
    gathered = 2 * b * tokens * h if s > 1 else 0
    backward = anew + 2 * b * tokens * h // s + max(halves, matrix - 3 * halves // 2) + gathered
    after = _after(config, arch, layout, stage)
    busiest = max(head + probabilities, backward)
    own = -(-replica_tokens // layout.context)
    own_more = extra_rows(config, own, replica_tokens)
    budget = "model.recompute, batching.tokens_per_micro_batch, parallel.sequence, parallel.context"
    each = f"{layers} layers x {gib(kept)}" + (f" x {flight:g} in flight" if flight > 1 else "")
    step = (STEP_BYTES_PER_TOKEN + LAYOUT_BYTES_PER_TOKEN) * (own + own_more) + 2 * b * tokens * arch.head_dim
    lines = [
        MemoryLine(
            "activations",
            activations,
            UPDATE,
            f"{each}, recompute {recompute_words(model)}, {tokens:,} tokens, torch's layers",
            budget,
        ),
        MemoryLine(
            "one layer's backward",
            max(0, backward - head - probabilities),
            UPDATE,
            f"{gib(backward)} less the head, which is over then"
            if head
            else "gradients, and what is made anew",
            budget,
        ),
    ]
    if s > 1:
        # One buffer for all layers, into which Megatron gathers; it stays when the step is over.
        detail = f"{tokens:,} tokens of all tensor-parallel ranks, one layer at a time"
        lines.append(
            MemoryLine("gathered sequence", b * tokens * h, STATE, detail, "batching.tokens_per_micro_batch")
        )
    if head:
        detail = "input thrice for its norm, chosen, scaled, dX in float32; tiles of logits"
        lines.append(MemoryLine(HEAD, head, UPDATE, detail, "batching.tokens_per_micro_batch"))
        lines.append(
            MemoryLine(
                KEPT,
                probabilities,
                UPDATE,
                "of the budget on a CPU, in float32",
                "model.keep_logits_gib",
            )
        )
    lines += [
        MemoryLine(
            "the step's micro-batches",
            step,
            UPDATE,
            f"{own:,} tokens and their labelled rows, at most",
            "rollout.prompts_per_step, policy.minibatches",
        ),
        MemoryLine(
            "after the layers",
            max(0, after + int(activations * (flight - 1) / flight) - activations - busiest),
            UPDATE,
            f"the embedding's gradient or gloo's copy of all, {gib(after)}, less what is over then",
            "parallel.tensor, optimizer.distributed",
        ),
    ]
    return lines


def _after(config: RunConfig, arch: Architecture, layout: Layout, stage: int) -> int:
    """The embedding's gradient, where this stage has it, or what gloo's reduce-scatter of gradients copies."""
    table = 0
    if stage == 0:
        table = DTYPE_BYTES[config.model.dtype] * arch.hidden_size * _columns(config, arch, layout)
    scatters = config.optimizer.distributed and layout.data * layout.context > 1
    copied = DTYPE_BYTES[config.optimizer.gradient_dtype] * _largest_bucket(config, arch, layout, stage)
    return max(table, copied if scatters else 0)


def _largest_bucket(config: RunConfig, arch: Architecture, layout: Layout, stage: int) -> int:
    """Most parameters of a rank that the distributed optimizer reduces or gathers at once, of which gloo has a copy.

    Megatron's bucket is a model chunk's; experts of other ranks than the rest have one of their own, and so has a tied
    vocabulary that two stages hold (its parameters with `shared_embedding`).
    """
    whole = stage_parameters(arch, layout, config.model.vocab_multiple)[stage]
    experts = stage_expert_parameters(arch, layout)[stage] if layout.expert > 1 else 0
    table = 0
    if arch.tied_embeddings and layout.pipeline > 1 and stage in (0, layout.pipeline - 1):
        table = _columns(config, arch, layout) * arch.hidden_size
    chunks = layout.virtual_pipeline
    return max(table, -(-experts // chunks), -(-(whole - table - experts) // chunks))


def _head(
    config: RunConfig, arch: Architecture, layout: Layout, tokens: int, replica_tokens: int
) -> tuple[int, int]:
    """(the head without, and of kept probabilities), as torch's backend works."""
    b, h = DTYPE_BYTES[config.model.dtype], arch.hidden_size
    s = layout.tensor if config.parallel.sequence else 1
    rows = tokens + extra_rows(config, tokens, replica_tokens)
    columns = min(_columns(config, arch, layout), arch.vocab_size)
    setting = config.model.keep_logits_gib
    whole = 4 * rows * columns
    kept = min(whole, KEEP_CPU_BYTES if setting is None else round(setting * GIB))
    tile = min(CPU_TILE_BYTES, whole)
    norm = tokens * (8 * h + 4 + b * h) // s
    chosen = b * rows * h + (2 * b * tokens * h if s > 1 else 0)
    widened = 0 if b == 4 else 4 * h * (rows + tile // (4 * rows))
    forward = int(_FORWARD_TILES * tile) + widened
    backward = 8 * rows * h + widened + (0 if kept == whole else 2 * tile)
    return norm + chosen + max(forward, backward), kept


def _columns(config: RunConfig, arch: Architecture, layout: Layout) -> int:
    return padded_vocab_size(arch.vocab_size, layout.tensor, config.model.vocab_multiple) // layout.tensor


def cpu_step_lines(
    config: RunConfig, arch: Architecture, layout: Layout, stage: int, size: RankBytes
) -> list[MemoryLine]:
    """What torch's AdamW takes for one parameter after the other, and gloo's copy of gathered weights."""
    t = layout.tensor
    f = arch.intermediate_size if arch.moe is None else arch.moe.intermediate_size
    largest = 2 * f * arch.hidden_size // (t if arch.moe is None else layout.expert_tensor)
    query = (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim
    largest = max(largest, query * arch.hidden_size // t)
    if stage in (0, layout.pipeline - 1):
        largest = max(largest, _columns(config, arch, layout) * arch.hidden_size)
    shards = layout.data * layout.context
    gathers = config.optimizer.distributed and shards > 1
    copied = 0
    if gathers:
        bucket = _largest_bucket(config, arch, layout, stage)
        largest = min(largest, -(-bucket // shards))
        copied = DTYPE_BYTES[config.model.dtype] * bucket
    adam = 8 * largest
    detail = "of the largest parameter a root and a quotient, in float32"
    lines = [MemoryLine("Adam's temporaries", adam, STEP, detail, "none: the vocabulary")]
    if copied > adam:
        detail = "gloo's copy of gathered weights, less Adam's temporaries"
        lines.append(MemoryLine("weights gathered", copied - adam, STEP, detail, "optimizer.distributed"))
    if config.optimizer.gradient_dtype != "float32" and config.model.dtype != "float32":
        detail = "of this rank's share"
        lines.append(
            MemoryLine("gradients in float32", size.optimizer // 3, STEP, detail, "optimizer.gradient_dtype")
        )
    return lines
