"""Seconds that an engine takes to generate a step's responses: a small simulation of its batches.

Responses of many lengths start together, as many as fit, and as one ends the next takes its place. Each decoded
position of a batch takes as long as its weights and caches take to be read, or its products to be made, whichever is
longer; so the few longest responses, of which a batch of one or two is left, are what a step often waits for.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_laser.config.model_folder.flops import forward_flops, head_flops, layer_flops_per_token
from megatron_laser.config.model_folder.parameters import DTYPE_BYTES
from megatron_laser.config.plan.resolve import Plan
from megatron_laser.config.server_options import server_option
from megatron_laser.errors import ConfigError
from megatron_laser.logprob_memory import GIB
from megatron_laser.planner.assumptions import Assumptions
from megatron_laser.planner.machine import Machine
from megatron_laser.planner.weights import (
    cache_bytes_per_token,
    expert_parameters,
    read_bytes,
    served_bytes,
    touched_experts,
)

_COMPACTED = 0.75  # `rollout/in_process.py`
_MOST_SEQUENCES = 512  # that are followed one by one; each stands for some when there are more


@dataclass(frozen=True, slots=True)
class Generation:
    """parts: seconds by name. bounds: what each waits for. detail: in words."""

    parts: Mapping[str, float]
    bounds: Mapping[str, str]
    detail: str


@dataclass(frozen=True, slots=True)
class _Server:
    """One engine, in what decoding one position costs.

    fixed: seconds of any position. read: of the dense weights. experts: of all experts' weights; `chance` says of how
    many of them. cache: to read one cached token. row: of one sequence. pair: of its attention to one token.
    """

    fixed: float
    read: float
    experts: float
    chance: float
    cache: float
    row: float
    pair: float
    row_overhead: float

    def position(self, rows: float, context: float) -> tuple[float, bool]:
        """Seconds of one position of so many rows with `context` tokens before it; whether reading bounds it."""
        touched = 1.0 - (1.0 - self.chance) ** rows if self.experts else 0.0
        memory = self.read + self.experts * touched + rows * context * self.cache
        compute = rows * (self.row + context * self.pair)
        return self.fixed + rows * self.row_overhead + max(memory, compute), memory >= compute


def generation(plan: Plan, machine: Machine, assumptions: Assumptions, server_gpus: int) -> Generation:
    """Of one step; arguments and errors as of `predict_step`."""
    config = plan.config
    rollout, arch = config.rollout, plan.architecture
    if rollout.engine == "none":
        return Generation({}, {}, "nobody generates: batches are recorded or made up")
    in_process = rollout.engine == "in_process"
    tensor = 1 if in_process else rollout.sglang.tensor
    gpus = server_gpus or (1 if in_process else plan.layout.world_size)
    if gpus % tensor:
        raise ConfigError(
            [
                f"{gpus} GPUs generate, which is not a multiple of rollout.sglang.tensor {tensor}: "
                f"{gpus % tensor} left over"
            ]
        )
    servers = gpus // tensor
    limit = rollout.max_new_tokens
    prompt = min(config.data.max_prompt_tokens, max(1, round(assumptions.prompt_tokens)))
    lengths = assumptions.lengths(limit)
    mean = sum(lengths) / len(lengths)
    sequences = plan.batch.sequences / servers
    running = _running(plan, machine, assumptions, tensor, prompt + mean, in_process)
    server = _server(plan, machine, tensor)
    found = _simulate(server, sequences, min(running, sequences), prompt, lengths, in_process)
    dtype = _served_dtype(plan)
    group = rollout.samples_per_prompt
    # An engine in the process reads a prompt once for its group; a server finds most of the others' in its cache.
    anew = 1.0 if in_process else 1.0 + (group - 1) * (1.0 - assumptions.prefix_cached)
    prompts = sequences / group * anew
    common = min(prompt - 1, round(assumptions.common_tokens))  # read once for all prompts
    shared = forward_flops(arch, common, 0)
    whole = prompts * (forward_flops(arch, prompt, 1) - shared) + shared
    prefill = whole / (tensor * machine.flops(dtype) * machine.prefill_efficiency)
    parts = {
        "prefill": prefill,
        "reading": found.reading,
        "computing": found.computing,
        "overhead": found.overhead,
        "responses": sequences * machine.request_overhead,
    }
    if config.laser.enabled and config.laser.score_source == "server" and not in_process:
        # One request of one new token behind each response, of which the engine has the rest cached.
        full = max(1.0, min(running, sequences))
        parts["scoring"] = sequences / full * server.position(full, prompt + mean)[0]
    bounds = {
        "prefill": "compute",
        "reading": "memory bandwidth",
        "computing": "compute",
        "overhead": "launches",
        "responses": "rank 0",
        "scoring": "memory bandwidth",
    }
    what = "the process of rank 0" if in_process else f"{servers} servers x {tensor} GPUs"
    detail = (
        f"{what}: {sequences:,.0f} responses each, {min(running, sequences):,.0f} at once, mean {mean:,.0f} tokens, "
        f"longest {lengths[-1]:,}; the last tenth of them takes {found.tail:.0%} of the time"
    )
    return Generation(parts, bounds, detail)


def _served_dtype(plan: Plan) -> str:
    quantized = plan.config.rollout.engine == "sglang" and plan.config.rollout.sglang.quantization
    return "fp8" if quantized else plan.config.model.dtype


def _server(plan: Plan, machine: Machine, tensor: int) -> _Server:
    arch = plan.architecture
    itemsize = DTYPE_BYTES[plan.config.model.dtype]
    of_experts = served_bytes(plan) * expert_parameters(arch) / plan.parameters
    read = read_bytes(plan)
    bandwidth = tensor * machine.memory_bandwidth * machine.bandwidth_efficiency
    rate = tensor * machine.flops(_served_dtype(plan)) * machine.decode_efficiency
    pairs = tensor * machine.flops(plan.config.model.dtype) * machine.decode_efficiency
    heads = min(tensor, arch.num_key_value_heads)  # beyond it ranks hold copies of keys and values
    messages = 0.0
    per_row = 0.0
    if tensor > 1:
        times = 2 * arch.num_layers
        messages = times * machine.latency(tensor)
        size = 2 * (tensor - 1) / tensor * arch.hidden_size * itemsize
        per_row = times * size / machine.bandwidth(tensor)
    row = arch.num_layers * layer_flops_per_token(arch) + head_flops(arch, 1)
    return _Server(
        fixed=machine.decode_overhead + messages,
        read=read / bandwidth,
        experts=of_experts / bandwidth,
        chance=touched_experts(arch, 1.0),
        cache=cache_bytes_per_token(arch, itemsize) / bandwidth * tensor / heads,
        row=row / rate,
        pair=arch.num_layers * 4 * arch.num_attention_heads * arch.head_dim / pairs,
        row_overhead=machine.row_overhead + per_row,
    )


def _running(
    plan: Plan, machine: Machine, assumptions: Assumptions, tensor: int, tokens: float, in_process: bool
) -> float:
    """Sequences that one engine works on at once, at most."""
    rollout = plan.config.rollout
    if in_process:
        return float(max(rollout.samples_per_prompt, rollout.max_batch_size))
    fraction = server_option(rollout.sglang.options, "mem_fraction_static", None)
    share = assumptions.memory_fraction if fraction is None else float(fraction)
    pool = share * machine.memory_gib * GIB - served_bytes(plan) / tensor
    heads = min(tensor, plan.architecture.num_key_value_heads)
    each = tokens * cache_bytes_per_token(plan.architecture, DTYPE_BYTES[plan.config.model.dtype]) / heads
    if pool < each:
        raise ConfigError(
            [
                f"a server of {tensor} GPUs has {pool / GIB:.1f} GiB left beside its weights for keys and values, "
                f"and one response needs {each / GIB:.1f}: raise rollout.sglang.tensor"
            ]
        )
    return min(float(rollout.max_concurrency_per_server), pool / each)


@dataclass(frozen=True, slots=True)
class _Simulated:
    reading: float
    computing: float
    overhead: float
    tail: float  # share of the time in which a tenth of the responses or fewer are left


@lru_cache(maxsize=4096)
def _simulate(
    server: _Server, sequences: float, running: float, prompt: int, lengths: tuple[int, ...], waves: bool
) -> _Simulated:
    """Follow one engine's batch from the first position to the last.

    Args:
        waves: the next sequences start when all of a batch have ended, not as one of them does.
    """
    followed = max(1, min(round(sequences), _MOST_SEQUENCES))
    weight = sequences / followed
    drawn = [lengths[int((number + 0.5) / followed * len(lengths))] for number in range(followed)]
    if not waves:
        drawn[-1] = lengths[-1]  # a step waits for the server that has the longest of all
    random.Random(0).shuffle(drawn)
    slots = max(1, min(followed, round(running / weight)))
    clock = reading = computing = overhead = tail = 0.0
    ends: list[int] = []  # positions at which sequences end
    starts = 0.0  # sum of the positions at which those that run have started
    started: dict[int, list[int]] = {}
    waiting = iter(drawn)
    left, position, held = followed, 0, 0

    def fill() -> None:
        nonlocal starts
        while len(ends) < slots:
            length = next(waiting, None)
            if length is None:
                return
            heapq.heappush(ends, position + length)
            started.setdefault(position + length, []).append(position)
            starts += position

    fill()
    while ends:
        until = ends[0]
        # The engine in the process keeps rows that have ended until they are a quarter of its batch.
        held = len(ends) if not waves or len(ends) <= _COMPACTED * held or len(ends) > held else held
        rows = held * weight
        context = prompt + (position + until) / 2 - starts / len(ends)
        seconds, memory_bound = server.position(rows, context)
        fixed = server.fixed + rows * server.row_overhead
        count = until - position
        clock += count * seconds
        overhead += count * fixed
        if memory_bound:
            reading += count * (seconds - fixed)
        else:
            computing += count * (seconds - fixed)
        if left <= followed / 10:
            tail += count * seconds
        position = until
        while ends and ends[0] == until:
            heapq.heappop(ends)
            starts -= started[until].pop()
            left -= 1
        if not waves or not ends:
            fill()
    return _Simulated(reading, computing, overhead, tail / clock if clock else 0.0)
