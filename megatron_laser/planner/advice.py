"""What would help most: changes of one thing, each predicted again, with what it costs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_laser.config.derived import old_policy_pass_kind
from megatron_laser.config.plan.resolve import another_layout
from megatron_laser.errors import ConfigError
from megatron_laser.planner.assumptions import Assumptions
from megatron_laser.planner.layouts import Candidate, Split
from megatron_laser.planner.machine import Machine
from megatron_laser.planner.ranking import Ranked, predicted
from megatron_laser.planner.run_file import changed

NO_FP8_SERVERS = ("b200",)
"""Machines on which SGLang's block-wise FP8 of `rollout.sglang.quantization` is not supported here."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that could be done: its settings, who gets how many GPUs, and what it costs, in words."""

    name: str
    settings: dict[str, Any]
    split: Split
    price: str


@dataclass(frozen=True, slots=True)
class Advice:
    """A change, predicted. fits: whether its memory does."""

    change: Change
    ranked: Ranked
    gain: float  # seconds a step, against the chosen layout
    fits: bool


def advise(chosen: Ranked, machine: Machine, assumptions: Assumptions) -> list[Advice]:
    """Every change that can run, by seconds gained, most first; what does not fit comes last."""
    found = []
    for change in changes(chosen.candidate, machine):
        config = changed(chosen.plan.config, change.settings)
        try:
            plan = another_layout(chosen.plan, config, change.split.trainer)
        except ConfigError:
            continue
        ranked = predicted(Candidate(plan, change.split, chosen.candidate.shape), machine, assumptions)
        if ranked is None:
            continue
        fits = plan.memory.total <= machine.memory_gib * 2**30
        found.append(Advice(change, ranked, chosen.step.seconds - ranked.step.seconds, fits))
    return sorted(found, key=lambda one: (not one.fits, -one.gain))


def changes(candidate: Candidate, machine: Machine) -> Iterator[Change]:
    """What may be tried; whether it can run is for the checks to say."""
    yield from _gpu_changes(candidate, machine)
    yield from _rollout_changes(candidate, machine)
    yield from _trainer_changes(candidate, machine)


def _gpu_changes(candidate: Candidate, machine: Machine) -> Iterator[Change]:
    split, node = candidate.split, machine.gpus_per_node
    if split.engine != "apart":
        return
    train, serve = split.trainer, split.servers
    per_node = {"rollout.sglang.servers": node // candidate.plan.config.rollout.sglang.tensor}
    if train + serve <= node:
        if train + serve == node:
            yield Change(
                "a second node: one trains, one generates",
                per_node,
                Split(node, node, "apart"),
                f"{node} more GPUs",
            )
        return
    more, less = f"{node} more GPUs", f"{node} GPUs fewer"
    yield Change("one more node of servers", {}, Split(train, serve + node, "apart"), more)
    yield Change("one more node of trainers", {}, Split(train + node, serve, "apart"), more)
    if serve > node:
        yield Change("one node of servers less", {}, Split(train, serve - node, "apart"), less)
        yield Change(
            "one node from the servers to the trainer",
            {},
            Split(train + node, serve - node, "apart"),
            "nothing",
        )
    if train > node:
        yield Change("one node of trainers less", {}, Split(train - node, serve, "apart"), less)
        yield Change(
            "one node from the trainer to the servers",
            {},
            Split(train - node, serve + node, "apart"),
            "nothing",
        )


def _rollout_changes(candidate: Candidate, machine: Machine) -> Iterator[Change]:
    config, split = candidate.plan.config, candidate.split
    rollout, policy = config.rollout, config.policy
    corrected = {} if policy.importance_cap is not None else {"policy.importance_cap": 2.0}
    if split.engine == "apart" and rollout.ahead == 0:
        yield Change(
            "rollouts one step ahead",
            {"rollout.ahead": 1, "laser.score_source": "trainer", **corrected},
            split,
            "responses of weights one step old",
        )
    quantizes = machine.device == "cuda" and machine.name not in NO_FP8_SERVERS
    if quantizes and rollout.engine == "sglang" and rollout.sglang.quantization is None:
        price = "responses of a quantized policy; not run on a GPU yet"
        yield Change("servers in FP8", {"rollout.sglang.quantization": "fp8", **corrected}, split, price)
    for tensor in (rollout.sglang.tensor * 2, rollout.sglang.tensor // 2):
        if (
            split.engine == "apart"
            and tensor
            and split.servers % tensor == 0
            and tensor <= machine.gpus_per_node
        ):
            settings = {
                "rollout.sglang.tensor": tensor,
                "rollout.sglang.servers": min(split.servers, machine.gpus_per_node) // tensor,
                "rollout.min_servers": min(rollout.min_servers, max(1, split.servers // tensor)),
            }
            yield Change(f"servers of {tensor} GPUs", settings, split, "nothing")
    single = policy.minibatches * policy.epochs == 1 and rollout.ahead == 0 and rollout.oversample == 1
    if single and old_policy_pass_kind(config) != "none" and policy.importance_cap is None:
        yield Change(
            "no pass for old log-probs, scores from the servers",
            {"policy.old_logprobs": "on_policy", "laser.score_source": "server"},
            split,
            "the engine's grain in scores; mismatch is not corrected",
        )


def _trainer_changes(candidate: Candidate, machine: Machine) -> Iterator[Change]:
    config, split = candidate.plan.config, candidate.split
    parallel, model, budget = config.parallel, config.model, config.batching.tokens_per_micro_batch
    yield Change(
        f"context {2 * parallel.context}",
        {"parallel.context": 2 * parallel.context},
        split,
        "half the data-parallel ranks",
    )
    if parallel.context > 1:
        settings = {
            "parallel.context": parallel.context // 2,
            "batching.tokens_per_micro_batch": 2 * budget,
        }
        yield Change(
            f"context {parallel.context // 2}", settings, split, "twice the tokens of a micro-batch on a rank"
        )
    if model.recompute != "none":
        plain = {
            "model.recompute": "none",
            "model.recompute_layers": None,
            "model.offload_activations": False,
        }
        yield Change("recompute none", plain, split, "memory")
    if model.recompute != "full":
        yield Change("recompute full", {"model.recompute": "full"}, split, "computes layers again")
    yield Change(
        f"micro-batches of {2 * budget:,} tokens",
        {"batching.tokens_per_micro_batch": 2 * budget},
        split,
        "memory",
    )
    if config.optimizer.offload:
        yield Change("optimizer state on the GPU", {"optimizer.offload": False}, split, "memory")
    if parallel.pipeline > 1 and parallel.virtual_pipeline == 1:
        yield Change(
            "two chunks of layers a stage", {"parallel.virtual_pipeline": 2}, split, "twice the messages"
        )
    if model.fp8 == "none" and model.dtype == "bfloat16" and machine.device == "cuda":
        yield Change(
            "FP8 products in training", {"model.fp8": "blockwise"}, split, "noisier log-probs; memory"
        )
