"""Seconds of the trainer's passes and of its optimizer step, on the rank that takes longest."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laser.config.derived import (
    micro_batch_tokens,
    padded_tokens,
    pipeline_bubble,
    shared_prompt_problems,
)
from megatron_laser.config.model_folder.flops import (
    attention_flops,
    head_flops,
    layer_flops_per_token,
    mlp_flops_per_token,
    recomputed_flops,
)
from megatron_laser.config.model_folder.parameters import DTYPE_BYTES
from megatron_laser.config.plan.lines import KEPT
from megatron_laser.config.plan.resolve import Plan
from megatron_laser.config.readouts import readouts
from megatron_laser.planner.assumptions import Assumptions
from megatron_laser.planner.machine import Machine


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over a step's batch works on; FLOPs are means of one sequence in one layer, of a forward.

    tokens: of a sequence, without padding; padded: with it. rows: labelled. experts: of `layers`, what experts are.
    micro_batches: of one optimizer step on a rank, each of `tokens_per_micro_batch` on that rank. recomputed: of all
    layers, recomputed_experts: what of it experts are. head: of all rows, recomputed_head: of them again.
    """

    tokens: float
    padded: float
    rows: float
    layers: float
    experts: float
    attention: float
    head: float
    recomputed: float
    recomputed_experts: float
    recomputed_head: float
    micro_batches: float
    tokens_per_micro_batch: float


def shares_prompts(plan: Plan, machine: Machine) -> bool:
    """Whether a group's prompt goes through the trainer once for its responses: where layers are torch's on a CPU."""
    if machine.device != "cpu" or plan.config.batching.share_prompts is False:
        return False
    return not shared_prompt_problems(plan.config, experts=plan.architecture.moe is not None)


def work_of(plan: Plan, assumptions: Assumptions, *, share_prompts: bool = False) -> Pass:
    """The mean sequence of a batch, and how many are packed together; `share_prompts`: see `shares_prompts`."""
    config, arch = plan.config, plan.architecture
    prompt = min(config.data.max_prompt_tokens, max(1, round(assumptions.prompt_tokens)))
    responses = assumptions.lengths(config.rollout.max_new_tokens)
    count = len(responses)
    lengths = [prompt + response for response in responses]
    extra = sum(max(1, len(readout.tokens)) for readout in readouts(config)) if config.laser.enabled else 0
    rows = sum(responses) / count + extra
    tokens = sum(lengths) / count
    padded = sum(padded_tokens(length, config.parallel) for length in lengths) / count
    attention = sum(attention_flops(arch, length) for length in lengths) / count
    if share_prompts:
        # A group is cut where ranks and optimizer steps ask for more pieces than there are prompts.
        pieces = -(-plan.layout.data * config.policy.minibatches // plan.batch.prompts)
        together = max(1, plan.batch.samples_per_prompt // pieces)
        # Packed once, but for its last token, which stands before each response (`batching/shared_prompts.py`).
        tokens = (prompt - 1 + together) / together + sum(responses) / count
        attention -= (1 - 1 / together) * attention_flops(arch, prompt)
        common = min(prompt - 1, round(assumptions.common_tokens))
        groups = max(1.0, plan.batch.sequences_per_rank / together)
        # What all prompts of a micro-batch begin with is packed once for them.
        batches = max(1.0, plan.batch.sequences_per_rank * tokens / micro_batch_tokens(config))
        saved = max(0.0, 1 - batches / groups) / together
        tokens -= saved * common
        attention -= saved * attention_flops(arch, common)
        padded = tokens
    model = config.model
    layers = arch.num_layers
    if model.recompute == "full" and model.recompute_layers is not None:
        chunks = plan.layout.pipeline * plan.layout.virtual_pipeline
        layers = min(layers, model.recompute_layers * chunks)
    again = sum(recomputed_flops(arch, length, model.recompute, layers=layers) for length in lengths) / count
    of_experts = 0.0
    if arch.moe is not None and (model.recompute == "full" or "mlp" in model.recompute):
        of_experts = layers * tokens * mlp_flops_per_token(arch)
    kept = any(line.name == KEPT and line.bytes for line in plan.memory.lines)
    budget = micro_batch_tokens(config)
    on_rank = plan.batch.sequences_per_rank * padded
    # Sequences are not cut, so that a micro-batch is full but for half a sequence.
    room = max(budget - padded / 2, min(padded, budget))
    micro_batches = max(1.0, on_rank / room)
    return Pass(
        tokens=tokens,
        padded=padded,
        rows=rows,
        layers=padded * layer_flops_per_token(arch),
        experts=padded * mlp_flops_per_token(arch) if arch.moe is not None else 0.0,
        attention=attention,
        head=head_flops(arch, 1) * rows,
        recomputed=again,
        recomputed_experts=of_experts,
        recomputed_head=0.0 if kept else head_flops(arch, 1) * rows,
        micro_batches=micro_batches,
        tokens_per_micro_batch=on_rank / micro_batches / config.parallel.context,
    )


def passes(
    plan: Plan, machine: Machine, work: Pass, *, backward: bool, head: bool, imbalance: float = 0.0
) -> dict[str, float]:
    """Seconds of each part of one pass over the whole batch (all minibatches), by name.

    Args:
        backward: forward and backward, with recomputation and the gradients' reduction; else a forward alone.
        head: all labelled rows go through the vocabulary projection; else the scores' alone.
        imbalance: by how much the busiest data-parallel rank computes longer than the mean.
    """
    config, layout = plan.config, plan.layout
    minibatches = config.policy.minibatches
    on_rank = plan.batch.sequences_per_rank * minibatches  # of the whole batch
    share = on_rank / (layout.tensor * layout.context)
    stage = _slowest_stage(plan, work, head)
    peak = machine.flops(config.model.dtype)
    matrices = machine.flops("fp8") if config.model.fp8 != "none" else peak
    # A backward is two products for each of the forward's.
    factor = 1 / machine.forward_efficiency + (2 / machine.backward_efficiency if backward else 0.0)
    head_factor = (3 if backward else 1) / machine.head_efficiency
    rows = work.head if head else 0.0
    layers = work.layers + work.experts * (1 / machine.expert_efficiency - 1)
    parts = {
        "layers": share * layers * stage.layers * factor / matrices,
        "attention": share * work.attention * stage.layers * factor / peak,
        "head": share * rows * stage.head * head_factor / peak,
    }
    if backward:
        again = work.recomputed + work.recomputed_experts * (1 / machine.expert_efficiency - 1)
        parts["recomputed"] = share * again / layout.pipeline / (peak * machine.forward_efficiency)
        of_head = share * work.recomputed_head * stage.head
        parts["recomputed"] += of_head / (peak * machine.head_efficiency)
    counted = work.micro_batches * minibatches
    turns = 3 if backward else 1
    parts["overhead"] = counted * turns * stage.layers * machine.layer_overhead
    parts |= _communication(plan, machine, work, counted, stage.layers, backward, parts["attention"])
    busy = sum(parts.values())
    if layout.pipeline > 1:
        waiting = pipeline_bubble(config.parallel, [max(1, round(work.micro_batches))] * minibatches)
        parts["bubble"] = busy * waiting / (1 - waiting)
    if layout.data > 1:
        parts["imbalance"] = busy * imbalance
    return parts


@dataclass(frozen=True, slots=True)
class _Stage:
    layers: int
    head: float  # 1: it has the head


def _slowest_stage(plan: Plan, work: Pass, head: bool) -> _Stage:
    """The pipeline stage with the most to compute; the last one has the head."""
    stages = plan.layout.layers(plan.architecture.num_layers)
    each = work.layers + work.attention
    found = [
        _Stage(layers, 1.0 if head and number == len(stages) - 1 else 0.0)
        for number, layers in enumerate(stages)
    ]
    return max(found, key=lambda stage: stage.layers * each + stage.head * work.head)


def _communication(
    plan: Plan,
    machine: Machine,
    work: Pass,
    micro_batches: float,
    layers: int,
    backward: bool,
    attention: float,
) -> dict[str, float]:
    """Seconds of a rank's messages in one pass over the batch; `attention`: seconds that a ring hides behind."""
    config, layout, arch = plan.config, plan.layout, plan.architecture
    itemsize = DTYPE_BYTES[config.model.dtype]
    tokens = micro_batches * work.tokens_per_micro_batch
    turns = 2 if backward else 1
    found: dict[str, float] = {}
    t, c = layout.tensor, layout.context
    if t > 1:
        # An all-reduce, or a gather and a scatter with `parallel.sequence`, behind attention and behind the MLP.
        again = 1 if backward and config.model.recompute == "full" else 0
        times = 2 * (turns + again) * layers
        size = 2 * (t - 1) / t * tokens * arch.hidden_size * itemsize
        found["tensor"] = times * (size / machine.bandwidth(t) + micro_batches * machine.latency(t))
    if c > 1:
        width = 2 * arch.num_key_value_heads * arch.head_dim * itemsize / min(t, arch.num_key_value_heads)
        times = layers * (
            3 if backward else 1
        )  # keys and values once more in the backward, with their gradients
        ring = times * (
            (c - 1) * tokens * width / machine.bandwidth(t * c) + micro_batches * machine.latency(t * c)
        )
        found["context"] = max(ring * (1 - machine.overlap), ring - attention)
    if layout.pipeline > 1:
        size = tokens * arch.hidden_size * itemsize / (t if config.parallel.sequence else 1)
        reach = t * c * layout.data * layout.pipeline
        times = turns * layout.virtual_pipeline
        each = size / machine.bandwidth(reach) + micro_batches * machine.latency(reach)
        found["pipeline"] = times * each
    if arch.moe is not None and layout.expert > 1:
        sent = arch.moe.experts_per_token * (layout.expert - 1) / layout.expert
        size = tokens / (t if config.parallel.sequence else 1) * arch.hidden_size * itemsize * sent
        reach = layout.expert * layout.expert_tensor
        found["experts"] = (
            2 * turns * layers * (size / machine.bandwidth(reach) + micro_batches * machine.latency(reach))
        )
    if backward:
        found |= _reduction(plan, machine)
    return found


def _reduction(plan: Plan, machine: Machine) -> dict[str, float]:
    """Gradients to all ranks that hold the same weights, and weights back from the optimizer's shards."""
    config, layout = plan.config, plan.layout
    replicas = layout.data * layout.context
    if replicas == 1:
        return {}
    reach = layout.tensor * replicas
    steps = config.policy.minibatches
    sent = (replicas - 1) / replicas / machine.bandwidth(reach, layout.tensor)
    settings = config.optimizer
    gradients = (1 if settings.distributed else 2) * plan.bytes_per_rank.gradients * sent + machine.latency(
        reach
    )
    found = {"gradients": steps * gradients * (1 - machine.overlap * settings.overlap_grad_reduce)}
    if settings.distributed:
        weights = plan.bytes_per_rank.weights * sent + machine.latency(reach)
        found["parameters"] = steps * weights * (1 - machine.overlap * settings.overlap_param_gather)
    return found


def moved_by_optimizer(plan: Plan) -> float:
    """Bytes that a rank reads and writes in one update: its state and gradients, and the weights that it makes."""
    size = plan.bytes_per_rank
    shards = plan.layout.data * plan.layout.context if plan.config.optimizer.distributed else 1
    return 2 * size.optimizer + (2 * size.gradients + size.weights) / shards


def optimizer_step(plan: Plan, machine: Machine) -> dict[str, float]:
    """Seconds of one AdamW step on a rank: all of the state is read and written once."""
    share = machine.optimizer_efficiency or machine.bandwidth_efficiency
    found = {
        "optimizer": moved_by_optimizer(plan) / (machine.memory_bandwidth * share),
        "overhead": machine.step_overhead,
    }
    if plan.config.optimizer.offload:
        found["offload"] = (
            2 * plan.bytes_per_rank.optimizer / (machine.host_bandwidth * machine.link_efficiency)
        )
    return found
