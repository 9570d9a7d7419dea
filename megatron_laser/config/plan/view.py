"""A plan as rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from megatron_laser.config.derived import micro_batch_tokens
from megatron_laser.config.model_folder.special_tokens import ScoreToken
from megatron_laser.config.plan.context import ContextShare
from megatron_laser.config.plan.lines import HOST, KEPT, PHASES, STATE, gib
from megatron_laser.config.plan.resolve import Plan


def render_plan(plan: Plan, balance: Sequence[str] = ()) -> RenderableType:
    """Layout, batch, memory and features, one table each. `balance`: lines of `batching.expected` for the second."""
    return Group(_model(plan), _batch(plan, balance), _memory(plan), _features(plan))


def _model(plan: Plan) -> Table:
    table, arch, layout = _table(f"Run {plan.config.run.name}"), plan.architecture, plan.layout
    stages = " + ".join(map(str, layout.stage_layers))
    parts = [
        f"{layout.world_size} ranks",
        f"tensor {layout.tensor}" + (" with sequence parallel" if plan.config.parallel.sequence else ""),
        f"pipeline {layout.pipeline}" + (f" of {stages} layers" if len(set(layout.stage_layers)) > 1 else ""),
        f"virtual pipeline {layout.virtual_pipeline}",
        f"context {layout.context}",
        f"data {layout.data}",
    ]
    if arch.moe is not None:
        parts += [f"expert {layout.expert} x {layout.expert_tensor}, each held by {layout.expert_data}"]
    table.add_row("layout", ", ".join(parts))
    if plan.context is not None:
        table.add_row("context", _context(plan, plan.context))
    table.add_row("model", escape(str(plan.config.model.path)))
    mlp = f"MLP {arch.intermediate_size}"
    if arch.moe is not None:
        moe = arch.moe
        mlp = f"{moe.num_experts} experts of {moe.intermediate_size}, {moe.experts_per_token} for a token"
    table.add_row(
        "architecture",
        f"{arch.model_type}, {arch.num_layers} layers, hidden {arch.hidden_size}, {mlp}, "
        f"{arch.num_attention_heads} heads of {arch.head_dim}, "
        f"{arch.num_key_value_heads} key/value heads, embeddings "
        f"{'tied' if arch.tied_embeddings else 'untied'}",
    )
    table.add_row("vocabulary", f"{arch.vocab_size:,}, padded to {plan.padded_vocab_size:,}")
    for token in dict.fromkeys(one.token for one in plan.readout_tokens):
        label = "score token" if token == plan.score_token else "readout token"
        table.add_row(label, escape(_token(token)))
    return table


def _token(token: ScoreToken) -> str:
    name = f"{token.text} (id {'unknown' if token.id is None else token.id})" if token.text else f"{token.id}"
    state = "verified" if token.verified else "unverified"
    return f"{name}, {state}" + (f": {token.note}" if token.note else "")


def _context(plan: Plan, share: ContextShare) -> str:
    """Who shares what, why the longest sequence fits, and what that costs."""
    activations = next(line.bytes for line in plan.memory.lines if line.name == "activations")
    budget = plan.config.batching.tokens_per_micro_batch
    if share.needed:
        reason = (
            f"which is more than batching.tokens_per_micro_batch {budget:,} and fits because {share.ranks} ranks share "
            f"it; the same micro-batch on one rank would be {gib(share.ranks * activations)} of activations"
        )
    else:
        reason = f"which batching.tokens_per_micro_batch {budget:,} holds without sharing, too"
    return (
        f"{share.ranks} ranks share each sequence, {share.on_rank:,} tokens each of the longest, {share.longest:,}, "
        f"{reason}; a rank sends {gib(share.attention.forward)} of keys and values a layer in the forward, "
        f"{gib(share.attention.backward)} with gradients in the backward"
    )


def _batch(plan: Plan, balance: Sequence[str]) -> Table:
    table, batch = _table("Batch"), plan.batch
    table.add_row(
        "rollout",
        f"{batch.prompts:,} prompts x {batch.samples_per_prompt} samples = {batch.sequences:,} sequences",
    )
    table.add_row(
        "optimizer",
        f"{batch.optimizer_steps} step{'s' if batch.optimizer_steps > 1 else ''} per rollout batch, "
        f"{batch.sequences_per_optimizer_step:,} sequences each",
    )
    table.add_row("per data-parallel rank", f"{batch.sequences_per_rank:,} sequences per optimizer step")
    longest = batch.tokens_per_rank // batch.sequences_per_rank
    ranks = plan.layout.context
    table.add_row(
        f"at most, {longest:,} tokens each",
        f"{batch.tokens_per_rank:,} tokens in {batch.micro_batches_per_rank:,} micro-batches of up to "
        f"{micro_batch_tokens(plan.config):,}"
        + (f", {plan.config.batching.tokens_per_micro_batch:,} on each context rank" if ranks > 1 else ""),
    )
    for line in balance:
        table.add_row("expected balance", escape(line))
    return table


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(title="Memory of the fullest rank", title_justify="left", show_header=False)
    stages = sorted(set(plan.stage_parameters))
    share = " to ".join(f"{count:,}" for count in dict.fromkeys((stages[0], stages[-1])))
    table.add_row("parameters", "", f"{plan.parameters:,}; per rank {share}")
    for line in memory.lines:
        # That there is no room for probabilities is worth a line.
        if line.phase != HOST and (line.bytes or line.name == KEPT):
            when = "" if line.phase == STATE else f"{line.phase}: "
            table.add_row(line.name, gib(line.bytes), escape(when + line.detail))
    phases = [(phase, memory.phase_bytes(phase)) for phase in PHASES]
    table.add_row(
        "sum",
        gib(memory.total),
        f"{gib(memory.phase_bytes(STATE))} always + the largest of "
        + ", ".join(f"{phase} {gib(size)}" for phase, size in phases if size or phase == memory.peak_phase)
        + (f"; the GPU has {plan.gpu_memory_gib:g} GiB" if plan.device == "cuda" else "; tensors on a CPU"),
    )
    if memory.host:
        parts = ", ".join(f"{line.name} {gib(line.bytes)}" for line in memory.lines if line.phase == HOST)
        table.add_row("host memory", gib(memory.host), f"page-locked, for each rank: {parts}")
    return table


def _features(plan: Plan) -> Table:
    table = Table(title="What runs", title_justify="left", show_header=False)
    for feature in plan.features:
        state = "[green]on[/green]" if feature.on else "off"
        table.add_row(feature.name, state, escape(feature.detail))
    return table


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", show_header=False)
