"""What a rank's forward and backward passes take: activations, the head, and what a step's micro-batches bring along.

In flight on stage s of p are p - s micro-batches, with v chunks of layers a stage p + (p - 1 - 2 s) / v times its
layers (Narayanan et al. 2021, arXiv 2104.04473, section 2.2, and Megatron's interleaved schedule: 2 (p - 1 - s) +
(v - 1) p + 1 chunks).
"""

from __future__ import annotations

from megatron_laser.config.derived import recompute_words
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.parameters import DTYPE_BYTES, Layout, padded_vocab_size
from megatron_laser.config.plan.activations import inside_mlp, layer_activation_bytes
from megatron_laser.config.plan.context import attention_bytes, rank_tokens
from megatron_laser.config.plan.head_rows import extra_rows
from megatron_laser.config.plan.lines import HEAD, HOST, KEPT, UPDATE, MemoryLine, gib
from megatron_laser.config.schema.inputs import Recompute
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.logprob_memory import GIB, MIB, TILE_BYTES, choose_keep_budget

PIECE = 8 * MIB  # model/activation_offload.py
STEP_BYTES_PER_TOKEN = 56  # ids, positions, labels, log-probs, weights of a step's micro-batches
SET_BYTES = 8  # of one id of the tokens that another was sampled from


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage keeps at once, the module's formula, of `micro_batches` in all."""
    p, v = layout.pipeline, layout.virtual_pipeline
    most = float(p - stage) if v == 1 else p + (p - 1 - 2 * stage) / v
    return min(float(micro_batches), most)


def _ordinal(stage: int, stages: int) -> str:
    if stage in (0, stages - 1):
        return "the last" if stage else "the first"
    return f"number {stage + 1} of {stages}"


def update_lines(
    config: RunConfig,
    arch: Architecture,
    layout: Layout,
    stage: int,
    micro_batches: int,
    replica_tokens: int,
) -> list[MemoryLine]:
    """What the forward and backward passes of an optimizer step take on a rank of pipeline stage `stage`."""
    tokens = rank_tokens(config, replica_tokens)
    itemsize = DTYPE_BYTES[config.model.dtype]
    model, t, p = config.model, layout.tensor, layout.pipeline

    def layer(recompute: Recompute) -> tuple[int, int]:
        kept, anew = layer_activation_bytes(
            arch,
            tokens=tokens,
            itemsize=itemsize,
            tensor=t,
            sequence=config.parallel.sequence,
            recompute=recompute,
            expert_tensor=layout.expert_tensor,
        )
        again = recompute == "full" or "core_attn" in recompute
        return (kept, anew + context.kept) if again else (kept + context.kept, anew)

    context = attention_bytes(config, arch, tokens)
    kept, anew = layer(model.recompute)
    layers = layout.layers(arch.num_layers)[stage]
    plain = 0  # layers that keep everything
    if model.recompute == "full" and model.recompute_layers is not None:
        plain = max(0, layers - model.recompute_layers * layout.virtual_pipeline)
    of_plain = layer("none")[0]
    flight = in_flight(layout, stage, micro_batches)
    inputs = kept * (layers - plain)
    more = extra_rows(config, tokens, replica_tokens)
    head = _head(config, arch, layout, tokens, more, itemsize) if stage == p - 1 else []
    where_stage = "" if p == 1 else f", {_ordinal(stage, p)} stage"
    unit = itemsize * tokens
    transient = unit * 2 * arch.hidden_size + inside_mlp(arch, unit, t, layout.expert_tensor) + anew
    budget = "model.recompute, batching.tokens_per_micro_batch, parallel.sequence, parallel.context"
    each = f"{layers - plain} layers x {gib(kept)}" + (f" + {plain} x {gib(of_plain)}" if plain else "")
    if flight > 1:
        each = f"({each})" * bool(plain) + each * (not plain) + f" x {flight:g} in flight"
    where = f" on each of {layout.context} context ranks" if layout.context > 1 else ""
    own = -(-replica_tokens // layout.context)
    own_more = extra_rows(config, own, replica_tokens)
    lines = [
        MemoryLine(
            "activations",
            _on_device(layers, kept, flight, p)
            if model.offload_activations
            else int((inputs + of_plain * plain) * flight),
            UPDATE,
            f"{each}, recompute {recompute_words(model)}, {tokens:,} tokens{where}{where_stage}"
            + (", in host memory but for two" if model.offload_activations else ""),
            budget,
        ),
        MemoryLine("one layer's backward", transient, UPDATE, "gathered inputs, gradients", budget),
        *head,
        MemoryLine(
            "the step's micro-batches",
            STEP_BYTES_PER_TOKEN * (own + own_more),
            UPDATE,
            f"at most {own:,} tokens" + (f" and {own_more:,} rows of readouts" if own_more else ""),
            "rollout.prompts_per_step, policy.minibatches" + (", laser.readouts" if own_more else ""),
        ),
    ]
    if config.rollout.top_k is not None:
        ids, minibatches = config.rollout.top_k * own, config.policy.minibatches
        lines.append(
            MemoryLine(
                "sampled sets",
                SET_BYTES * ids * minibatches,  # all minibatches of a rollout batch are made at once
                UPDATE,
                f"ids of {config.rollout.top_k} tokens for each of at most {own * minibatches:,}",
                "rollout.top_k, rollout.prompts_per_step",
            )
        )
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
    if model.offload_activations:
        lines.append(
            MemoryLine(
                "activations",
                int(-(-kept // PIECE) * PIECE * layers * flight),
                HOST,
                f"layers' inputs, in pieces of {gib(PIECE)}",
                "model.offload_activations",
            )
        )
    if context.buffers:
        detail = f"keys, values and gradients of {layout.context} context ranks, one layer at a time"
        lines.append(MemoryLine("context attention", context.buffers, UPDATE, detail, budget))
    return lines


def _on_device(layers: int, kept: int, flight: float, stages: int) -> int:
    """What `offload_activations` leaves on the GPU: two layers' inputs, one on its way and one in use, and in a
    pipeline what the schedule keeps of each micro-batch in flight, the stage's input and output."""
    return min(2, layers) * kept + (int(2 * flight * kept) if stages > 1 else 0)


def _head(
    config: RunConfig, arch: Architecture, layout: Layout, tokens: int, more: int, itemsize: int
) -> list[MemoryLine]:
    """more: labelled rows beyond one a token."""
    rows = tokens + more
    tile = min(TILE_BYTES, 4 * rows * _columns(config, arch, layout))
    # The input as it is [tokens]; chosen and scaled, and its gradient [rows].
    inputs = itemsize * arch.hidden_size * (tokens + 2 * rows)
    return [
        MemoryLine(
            HEAD,
            inputs + 4 * arch.hidden_size * rows + tile + tile * itemsize // 4,
            UPDATE,
            "input twice and scaled, dX in float32, a tile of logits and its gradient"
            + (f"; {more:,} rows of readouts beside {tokens:,}" if more else ""),
            "batching.tokens_per_micro_batch" + (", laser.readouts" if more else ""),
        )
    ]


def _probabilities(config: RunConfig, arch: Architecture, layout: Layout, replica_tokens: int) -> int:
    """Bytes of all probabilities of a micro-batch's rows on one rank, which has one shard of the vocabulary."""
    tokens = rank_tokens(config, replica_tokens)
    rows = tokens + extra_rows(config, tokens, replica_tokens)
    return DTYPE_BYTES[config.model.dtype] * rows * _columns(config, arch, layout)


def kept_lines(
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
