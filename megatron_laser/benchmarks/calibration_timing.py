"""The timing behind a calibration: passes, updates, decoded positions and syncs, and what follows for a machine.

Two sizes of each are timed: what grows with the work is a rate, the rest is overhead.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.benchmarks.random_rollouts import random_rollouts
from megatron_laser.config.model_folder.flops import (
    attention_flops,
    forward_flops,
    head_flops,
    layer_flops_per_token,
    recomputed_flops,
)
from megatron_laser.config.model_folder.parameters import tensor_shapes
from megatron_laser.config.plan.resolve import Plan
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.model import platform
from megatron_laser.observability.timers import Timers
from megatron_laser.planner.training import moved_by_optimizer
from megatron_laser.planner.weights import read_bytes, served_bytes
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.trainer.forward_backward import run_forward
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.types import SamplingParams
from megatron_laser.weight_sync.update import sync_weights

logger = logging.getLogger(__name__)

SCORE_TOKEN = 2
_MOST_POSITIONS = 48  # that are decoded in one measurement
_SYNCS = 3
_BATCHES = 4
_SLOW = 1.0  # seconds of a forward, from which on a batch is timed twice only
_TINY = 1e-12
_MOST_EFFICIENCY = 4.0
_SAMPLE_SECONDS = 1.0
_SAMPLES = 8
_MOST_CALLS = 100


@dataclass(frozen=True, slots=True)
class Sizes:
    """prompts: of the whole batch that is trained on, and of its smaller one. prompt, response: tokens of each."""

    prompts: tuple[int, int]
    samples: int
    prompt: int
    response: int


@dataclass(frozen=True, slots=True)
class _Timed:
    """Of one batch on this rank. flops: of all layers' products in a forward. rows: labelled ones. scores, full:
    seconds of a forward with the head for scores alone, and for all rows. train: of the update."""

    flops: float
    rows: float
    micro_batches: int
    scores: float
    full: float
    train: float


def time_training(
    plan: Plan, trainer: Trainer, timers: Timers, sizes: Sizes, found: Mapping[str, Any], runtime: Runtime
) -> dict[str, float]:
    """Passes over two batches: what grows with the tokens are products, the rest is overhead."""
    arch, peak = plan.architecture, next(iter(found["matmul_flops"].values()))
    large, small = (_passes(plan, trainer, timers, sizes, prompts, runtime) for prompts in sizes.prompts)
    each, overhead = line(
        (large.flops, large.micro_batches, large.scores), (small.flops, small.micro_batches, small.scores)
    )
    head = max(_TINY, large.full - large.scores)
    grown = large.train - small.train
    grown -= 3 * overhead * (large.micro_batches - small.micro_batches)
    grown -= 3 * head * (1 - small.rows / large.rows)
    # What recomputation makes again is a forward, too.
    length = sizes.prompt + sizes.response
    again = recomputed_flops(arch, length, plan.config.model.recompute) / forward_flops(arch, length, 0)
    say("the optimizer")
    optimizer = quick_seconds(functools.partial(_update, trainer), runtime)
    reduction = 0.0
    if runtime.world_size > 1:
        sent = 2 * (runtime.world_size - 1) / runtime.world_size * plan.bytes_per_rank.gradients
        reduction = found["node_latency"] + sent / found["node_bandwidth"]
    slope = grown / (large.flops - small.flops) - each * (1 + again)
    backward, rest = backward_and_rest(
        slope if slope > 0.0 else 2 * each,  # a machine that others use; a backward is two products
        large.train - large.flops * each * (1 + again) - 3 * (head + overhead * large.micro_batches),
        large.flops,
        optimizer + reduction,
    )
    figures = {
        "forward_efficiency": 1 / (peak * each),
        "backward_efficiency": 2 / (peak * backward),
        "head_efficiency": head_flops(arch, 1) * large.rows / (peak * head),
        "layer_overhead": overhead / arch.num_layers,
        "optimizer_efficiency": moved_by_optimizer(plan) / (found["memory_bandwidth"] * optimizer),
        "step_overhead": rest,
    }
    return {name: value if name.endswith("overhead") else _share(value) for name, value in figures.items()}


def backward_and_rest(slope: float, seconds: float, flops: float, other: float) -> tuple[float, float]:
    """(seconds of a FLOP of the backward, of an update besides) from `slope`, the first between two batches.

    seconds: of the larger batch's backward and all else, of which `other` is known. What two batches differ by is small
    beside what other programs take; more than all that there is it cannot be.
    """
    each = max(_TINY / flops, min(slope, (seconds - other) / flops))
    return each, max(0.0, seconds - other - flops * each)


def _share(value: float) -> float:
    """An efficiency that a machine file takes: what was too quick to be measured costs next to nothing."""
    return min(_MOST_EFFICIENCY, max(1e-6, value))


def line(first: tuple[float, int, float], second: tuple[float, int, float]) -> tuple[float, float]:
    """(seconds of a FLOP, of a micro-batch besides) that both (FLOPs, micro-batches, seconds) have."""
    across = first[0] * second[1] - second[0] * first[1]
    each = (first[2] * second[1] - second[2] * first[1]) / across if across else 0.0
    overhead = (first[2] - first[0] * each) / first[1]
    if each <= 0.0 or overhead < 0.0:
        return first[2] / first[0], 0.0
    return each, overhead


def _passes(
    plan: Plan, trainer: Trainer, timers: Timers, sizes: Sizes, prompts: int, runtime: Runtime
) -> _Timed:
    arch = plan.architecture
    say(f"the trainer, {prompts} x {sizes.samples} responses of {sizes.prompt} + {sizes.response} tokens")
    flat = _rollouts(plan, sizes, prompts)
    batches = trainer.prepare(flat).micro_batches
    chunks = trainer.policy.chunks
    tokens = sum(batch.tokens.numel() for batch in batches)
    sequences = prompts * sizes.samples / runtime.data_size
    length = sizes.prompt + sizes.response
    attention = sequences * attention_flops(arch, length)
    if tokens < sequences * length:  # a group's prompt is packed once
        attention -= (sequences - prompts / runtime.data_size) * attention_flops(arch, sizes.prompt)
    scores = quick_seconds(lambda: run_forward(chunks, batches, lambda one: one.only_scores()), runtime)
    full = quick_seconds(lambda: run_forward(chunks, batches, lambda one: one.without_entropy()), runtime)
    seconds = []
    count = 2 if scores > _SLOW else _BATCHES
    for number in range(count + 1):
        wait_for_all(runtime)
        trainer.run_batch(flat, number + 1)
        platform.synchronize()
        seconds.append(most(timers.collect()["time/train"]))
    return _Timed(
        flops=arch.num_layers * (tokens * layer_flops_per_token(arch) + attention),
        rows=sequences * (sizes.response + 1),
        micro_batches=len(batches),
        scores=scores,
        full=full,
        train=_quick(seconds[1:]),
    )


def _rollouts(plan: Plan, sizes: Sizes, prompts: int) -> FlatBatch:
    return random_rollouts(
        prompts=prompts,
        samples=sizes.samples,
        prompt=sizes.prompt,
        response=sizes.response,
        ids=(SCORE_TOKEN + 1, plan.architecture.vocab_size),
        eos=1,
    )


def _update(trainer: Trainer) -> None:
    """What an optimizer step does besides its passes, with the gradients of the last one or none."""
    policy = trainer.policy
    for module in policy.chunks.wrapped:
        module.zero_grad_buffer()
    policy.optimizer.zero_grad()
    policy.optimizer.prepare_grads()
    policy.optimizer.get_grad_norm()
    policy.optimizer.step()


def time_decoding(
    config: RunConfig,
    plan: Plan,
    engine: InProcessEngine,
    sizes: Sizes,
    found: Mapping[str, Any],
    layers: int,
) -> dict[str, float]:
    """A prefill, and positions of two batches: what grows with the rows is products, the rest is overhead."""
    arch, peak = plan.architecture, next(iter(found["matmul_flops"].values()))
    rollout = config.rollout
    prompts = max(1, min(rollout.prompts_per_step, rollout.max_batch_size // rollout.samples_per_prompt))
    rows = prompts * rollout.samples_per_prompt
    positions = max(2, min(_MOST_POSITIONS, rollout.max_new_tokens))
    flat = _rollouts(plan, sizes, prompts)
    ids = [flat.prompt_ids(number * sizes.samples).tolist() for number in range(prompts)]
    say(f"the engine, {rows} responses of {positions} tokens")

    def generate(count: int, samples: int, tokens: int) -> float:
        sampling = SamplingParams(
            samples_per_prompt=samples,
            max_new_tokens=tokens,
            stop_token_ids=(),
            temperature=rollout.temperature or 1.0,
            top_p=rollout.top_p,
            seed=1,
        )
        return quick_seconds(lambda: engine.generate(ids[:count], sampling, deadline=3600.0))

    first = generate(prompts, rollout.samples_per_prompt, 1)
    many = (generate(prompts, rollout.samples_per_prompt, positions) - first) / (positions - 1)
    few_rows = max(1, rows // 4)
    few = (generate(1, few_rows, positions) - generate(1, few_rows, 1)) / (positions - 1)
    prefill = prompts * forward_flops(arch, sizes.prompt, 1)
    context = sizes.prompt + positions / 2
    row = arch.num_layers * (
        layer_flops_per_token(arch) + 4 * arch.num_attention_heads * arch.head_dim * context
    ) + head_flops(arch, 1)
    slope = max(_TINY, (many - few) / max(1, rows - few_rows))
    figures = {"prefill_efficiency": _share(prefill / (peak * first))}
    read = read_bytes(plan) / (found["memory_bandwidth"] * found["bandwidth_efficiency"])
    if found["device"] == "cpu":
        figures["decode_efficiency"] = _share(row / (peak * slope))
        rest = many - max(read, rows * row / (peak * figures["decode_efficiency"]))
    else:  # there memory bounds a small model's positions
        figures["row_overhead"] = slope
        rest = many - read - rows * slope
    # Launches are of layers, of which some were left out.
    figures["decode_overhead"] = max(0.0, rest) * layers / arch.num_layers
    return figures


def time_sync(
    plan: Plan, trainer: Trainer, engine: InProcessEngine | None, bandwidth: float
) -> dict[str, float]:
    say("the weight sync")
    seconds = []
    for version in range(_SYNCS + 1):
        started = time.perf_counter()
        sync_weights(trainer.weight_stream(), engine, version=version + 1)
        platform.synchronize()
        seconds.append(time.perf_counter() - started)
    copies = 2 * served_bytes(plan) / bandwidth
    tensors = len(tensor_shapes(plan.architecture))
    return {"tensor_overhead": max(0.0, _quick(seconds[1:]) - copies) / tensors}


def quick_seconds(call: Callable[[], object], runtime: Runtime | None = None) -> float:
    """Seconds of one call, over as many as `_SAMPLE_SECONDS` have; the first does not count.

    With `runtime` all ranks call it at once, and the slowest rank counts. Where ranks share cores, one call is quick or
    slow by what the system lets run meanwhile; so each sample is of many calls behind each other, as a pass is.
    """

    def seconds(calls: int) -> float:
        if runtime is not None:
            wait_for_all(runtime)
        platform.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        platform.synchronize()
        each = (time.perf_counter() - started) / calls
        return each if runtime is None else most(each)

    seconds(1)
    first = max(_TINY, seconds(1))
    calls = max(1, min(_MOST_CALLS, round(_SAMPLE_SECONDS / _SAMPLES / first)))
    samples = max(1, min(_SAMPLES, round(_SAMPLE_SECONDS / first)))
    return _quick([first, *(seconds(calls) for _ in range(samples))])


def _quick(seconds: list[float]) -> float:
    """The lower quartile: what other programs take of the machine for a moment is not this one's."""
    return sorted(seconds)[len(seconds) // 4]


def wait_for_all(runtime: Runtime) -> None:
    if runtime.world_size > 1:
        dist.barrier(group=runtime.cpu_group)


def least(value: float) -> float:
    """Of all ranks: a step waits for the slowest."""
    return _over_ranks(value, dist.ReduceOp.MIN)


def most(value: float) -> float:
    return _over_ranks(value, dist.ReduceOp.MAX)


def _over_ranks(value: float, operation: Any) -> float:
    if dist.get_world_size() == 1:
        return float(value)
    tensor = torch.tensor([value], dtype=torch.float64, device=platform.device())
    dist.all_reduce(tensor, op=operation)
    return float(tensor)


def say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info("calibrating: %s", text)
