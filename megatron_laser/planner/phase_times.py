"""Seconds of each phase of a step, for one layout, by arithmetic: what bounds it and why, in words.

Generation is in `generation`, passes of the trainer in `training`; here they are put together as the loop does
(`loop.py`): one after the other, or side by side with `rollout.ahead`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_laser.config.derived import needs_reference_model, old_policy_pass_kind
from megatron_laser.config.model_folder.parameters import tensor_shapes
from megatron_laser.config.plan.lines import gib
from megatron_laser.config.plan.resolve import Plan
from megatron_laser.planner.assumptions import Assumptions
from megatron_laser.planner.generation import generation
from megatron_laser.planner.machine import Machine
from megatron_laser.planner.training import Pass, optimizer_step, passes, shares_prompts, work_of
from megatron_laser.planner.weights import expert_parameters, served_bytes


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """One phase. parts: seconds of each part, which add up to `seconds`. bound: what it waits for most. detail: the
    arithmetic in words."""

    name: str
    seconds: float
    parts: Mapping[str, float]
    bound: str
    detail: str


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step. phases: in the loop's order; names as of the metrics `time/<name>`. seconds: of the step, what overlaps
    counted once. bottleneck: the phase that the step waits for most. tokens: prompts and responses of the batch.
    trainer_idle, server_idle: share of the step in which either side waits for the other."""

    phases: tuple[PhaseTime, ...]
    seconds: float
    bottleneck: str
    tokens: float
    trainer_idle: float
    server_idle: float

    def phase(self, name: str) -> PhaseTime:
        """Raises KeyError where the step has no such phase."""
        for one in self.phases:
            if one.name == name:
                return one
        raise KeyError(name)


def predict_step(plan: Plan, machine: Machine, assumptions: Assumptions, server_gpus: int = 0) -> StepTime:
    """The time of one step of `plan` on GPUs of `machine`.

    Args:
        server_gpus: GPUs that generate and do not train; 0: the engine is in the process of rank 0, or its servers
            share the trainer's GPUs (`rollout.weight_sync: colocated`).

    Raises:
        ConfigError: the machine does not say what it computes in the model's dtype, or GPUs of servers are not a
            multiple of `rollout.sglang.tensor`.
    """
    config = plan.config
    generated = generation(plan, machine, assumptions, server_gpus)
    generate = _phase("generate", generated.parts, generated.detail, generated.bounds)
    grade = _grade(plan, assumptions, generate.seconds)
    work = work_of(plan, assumptions, share_prompts=shares_prompts(plan, machine))
    logprob = _logprob(plan, machine, work, assumptions.imbalance)
    train = _train(plan, machine, work, assumptions.imbalance)
    sync = _sync(plan, machine, server_gpus)
    phases = (generate, grade, logprob, train, sync)
    rollout, update = generate.seconds + grade.seconds, logprob.seconds + train.seconds
    seconds = (max(rollout, update) if config.rollout.ahead else rollout + update) + sync.seconds
    shared = server_gpus == 0
    # Side by side, the quicker side waits; one after the other, each waits for the other. What shares GPUs never waits.
    trainer_waits = max(0.0, rollout - update) if config.rollout.ahead else rollout
    if shared and config.rollout.engine == "sglang":
        trainer_waits = grade.seconds
    server_waits = 0.0 if shared else seconds - generate.seconds
    return StepTime(
        phases,
        seconds,
        max(phases, key=lambda one: one.seconds).name,
        plan.batch.sequences * work.tokens,
        trainer_waits / seconds if seconds else 0.0,
        max(0.0, server_waits) / seconds if seconds else 0.0,
    )


def _phase(
    name: str, parts: Mapping[str, float], detail: str, bounds: Mapping[str, str] | None = None
) -> PhaseTime:
    """`bounds`: what the part of each name waits for; a part's own name where it says nothing."""
    kept = {key: value for key, value in parts.items() if value > 0.0}
    seconds = sum(kept.values())
    if not kept:
        return PhaseTime(name, 0.0, dict({}), "nothing", detail)
    waits: dict[str, float] = {}
    for key, value in kept.items():
        reason = (bounds or {}).get(key, key)
        waits[reason] = waits.get(reason, 0.0) + value
    return PhaseTime(name, seconds, dict(kept), max(waits, key=lambda key: waits[key]), detail)


def _grade(plan: Plan, assumptions: Assumptions, generating: float) -> PhaseTime:
    """What grading takes beyond the generation that it goes on beside."""
    if plan.config.rollout.engine == "none":
        return _phase("grade", {}, "graded before")
    workers, each = plan.config.reward.workers, assumptions.grading_seconds
    busy = plan.batch.sequences * each / workers
    waits = max(each, busy - generating) if each else 0.0
    count = f"{plan.batch.sequences:,} responses x {each:g} s over {workers} workers"
    detail = f"{count} are {busy:.1f} s, beside the generation"
    return _phase("grade", {"grading": waits}, detail)


_BOUNDS = {
    "layers": "compute",
    "attention": "compute",
    "head": "compute",
    "recomputed": "compute",
    "overhead": "launches",
    "tensor": "network",
    "context": "network",
    "experts": "network",
    "pipeline": "network",
    "gradients": "network",
    "parameters": "network",
    "bubble": "pipeline bubble",
    "imbalance": "imbalance",
    "optimizer": "memory bandwidth",
    "offload": "host link",
    "onload": "host link",
}


def _logprob(plan: Plan, machine: Machine, work: Pass, imbalance: float) -> PhaseTime:
    """Passes without a gradient: the old policy's, and the reference model's."""
    kind = old_policy_pass_kind(plan.config)
    parts: dict[str, float] = {}
    words = []
    kinds = [] if kind == "none" else [kind]
    if needs_reference_model(plan.config):
        kinds.append("full")
        words.append("a reference model")
    for one in kinds:
        for name, seconds in passes(
            plan, machine, work, backward=False, head=one == "full", imbalance=imbalance
        ).items():
            parts[name] = parts.get(name, 0.0) + seconds
    what = {
        "full": "log-probs of all rows",
        "score_rows": "scores alone",
        "none": "no pass of the old policy",
    }[kind]
    detail = f"{what}{' and ' + words[0] if words else ''}: {len(kinds)} forward passes"
    return _phase("logprob", parts, detail, _BOUNDS)


def _train(plan: Plan, machine: Machine, work: Pass, imbalance: float) -> PhaseTime:
    epochs = plan.config.policy.epochs
    whole = passes(plan, machine, work, backward=True, head=True, imbalance=imbalance)
    parts = {name: epochs * value for name, value in whole.items()}
    for name, value in optimizer_step(plan, machine).items():
        parts[name] = parts.get(name, 0.0) + plan.batch.optimizer_steps * value
    if plan.config.rollout.weight_sync == "colocated" and plan.config.rollout.engine == "sglang":
        parts["onload"] = _state(plan) / (machine.host_bandwidth * machine.link_efficiency)
    detail = (
        f"{plan.batch.optimizer_steps} optimizer steps, {work.micro_batches:.0f} micro-batches each on a rank of "
        f"{work.tokens_per_micro_batch:,.0f} tokens"
    )
    return _phase("train", parts, detail, _BOUNDS)


def _state(plan: Plan) -> int:
    """Bytes of a rank's state that go to host memory while colocated servers have the GPU."""
    size = plan.bytes_per_rank
    return size.total - (size.optimizer if plan.config.optimizer.offload else 0)  # which is there already


def _sync(plan: Plan, machine: Machine, server_gpus: int) -> PhaseTime:
    """New weights for the engine: gathered on rank 0 as one stream, and sent in the way of `rollout.weight_sync`."""
    config, whole = plan.config, served_bytes(plan)
    rollout = config.rollout
    if rollout.engine == "none":
        return _phase("sync", {}, "no engine to give weights to")
    layout = plan.layout
    gathering = whole / machine.bandwidth(layout.tensor) if layout.tensor > 1 else 0.0
    if layout.pipeline > 1:  # the stages are the farthest from each other
        elsewhere = (layout.pipeline - 1) / layout.pipeline
        gathering += whole * elsewhere / machine.bandwidth(layout.world_size)
    if layout.expert > 1:
        of_experts = whole * expert_parameters(plan.architecture) / plan.parameters
        elsewhere = (layout.expert - 1) / layout.expert
        gathering += of_experts * elsewhere / machine.bandwidth(layout.expert * layout.expert_tensor)
    copy = 2 * whole / (machine.memory_bandwidth * machine.bandwidth_efficiency)
    tensors = len(tensor_shapes(plan.architecture)) * machine.tensor_overhead
    parts = {"gathering": gathering, "copy": copy, "tensors": tensors}
    bounds = {"gathering": "network", "copy": "memory bandwidth", "tensors": "rank 0"}
    if rollout.engine == "in_process":
        way = "copied in the process of rank 0"
    elif rollout.weight_sync == "colocated":
        parts["offload"] = _state(plan) / (machine.host_bandwidth * machine.link_efficiency)
        bounds["offload"] = "host link"
        way = "handed over on each GPU, and the trainer's state goes to host memory"
    elif rollout.weight_sync == "disk":
        parts["disk"] = 2 * whole / machine.disk_bandwidth
        bounds["disk"] = "disk"
        way = "written to a folder and read from it"
    else:
        far = plan.layout.world_size + server_gpus > machine.gpus_per_node
        link = machine.network_bandwidth if far else machine.node_bandwidth
        parts["broadcast"] = whole / (link * machine.link_efficiency)
        bounds["broadcast"] = "network"
        way = f"broadcast by rank 0 over one {'port of the network' if far else 'link of the node'}"
    return _phase("sync", parts, f"{gib(whole)} of weights, {way}", bounds)
