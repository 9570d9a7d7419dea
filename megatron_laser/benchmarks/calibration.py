"""What this machine does with this project's own code, as the fields of a machine file (`planner/machine.py`).

A model of random weights with the run's widths, and of its layers as many as a calibration has time for, goes through
the trainer, the in-process engine and the weight sync, with batches of the run's sizes. All ranks work at once, as they
do in a run, so that what they take from each other is in the figures; the engine works alone, as it does.
"""

from __future__ import annotations

import functools
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.benchmarks.measure import measure_ceilings, seconds_per_call
from megatron_laser.benchmarks.random_model import save_random_model
from megatron_laser.benchmarks.random_rollouts import random_rollouts
from megatron_laser.config import read_architecture
from megatron_laser.config.derived import micro_batch_tokens
from megatron_laser.config.model_folder.flops import (
    attention_flops,
    head_flops,
    layer_flops_per_token,
    recomputed_flops,
)
from megatron_laser.config.model_folder.parameters import count_parameters, tensor_shapes
from megatron_laser.config.plan.resolve import Plan, resolve_plan
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.model import platform
from megatron_laser.model.hf_config import read_hf_config
from megatron_laser.model.platform import DTYPES
from megatron_laser.observability.timers import Timers
from megatron_laser.planner.assumptions import Assumptions, read_assumptions
from megatron_laser.planner.machine import MACHINES
from megatron_laser.planner.training import moved_by_optimizer
from megatron_laser.planner.weights import read_bytes, served_bytes
from megatron_laser.rewards.workers.grading_pool import GradingPool
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.trainer.forward_backward import run_forward
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.types import SamplingParams
from megatron_laser.weight_sync.update import sync_weights

logger = logging.getLogger(__name__)

_MOST_PARAMETERS = {"cpu": 150e6, "cuda": 2e9}  # of the layers that are measured; a model is cut to these
_SCORE_TOKEN = 2
_MOST_POSITIONS = 48  # that are decoded in one measurement
_ROUNDS = 3
_BATCHES = 4
_TINY = 1e-12
_MOST_EFFICIENCY = 4.0
_SAMPLE_SECONDS = 0.5
_GRADED = 64
_MESSAGES = (2**12, 2**24)  # bytes of the all-reduces
_DISK_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class _Sizes:
    """prompts: of the whole batch that is trained on, and of its smaller one. prompt, response: tokens of each."""

    prompts: tuple[int, int]
    samples: int
    prompt: int
    response: int


def machine_text(measured: Mapping[str, Any]) -> str:
    """What `calibrate` returned, as a machine file."""
    return yaml.safe_dump(dict(measured), sort_keys=False, width=120)


def calibrate(config: RunConfig, assumptions: Assumptions | None = None) -> dict[str, Any] | None:
    """Measure this machine for the model and the batches of `config`; call on every rank that torchrun started.

    Args:
        config: the run. Its layout is left out: every rank has the whole model, and links are measured by themselves.
        assumptions: how long prompts and responses are; None: those of `read_assumptions`.

    Returns:
        The fields of a machine file, on rank 0; None on the others.

    Raises:
        ConfigError, ModelFolderError: as `resolve_plan` for `config`.
    """
    assumed = read_assumptions(config) if assumptions is None else assumptions
    resolve_plan(config, int(os.environ.get("WORLD_SIZE", "1")))
    with tempfile.TemporaryDirectory(prefix="calibration-") as scratch:
        measured = _reduced(config, Path(scratch))
        runtime = runtimes.start(measured)
        try:
            return _measure(config, measured, runtime, assumed, Path(scratch))
        finally:
            runtimes.stop()


def _reduced(config: RunConfig, scratch: Path) -> RunConfig:
    """`config` on a random model of its widths, cut to what can be measured, and with every rank for itself."""
    hf = read_hf_config(config.model.path)
    arch = read_architecture(config.model.path)
    whole = count_parameters(arch)
    one_layer = sum(
        _elements(shape) for name, shape in tensor_shapes(arch).items() if name.startswith("model.layers.0.")
    )
    most = _MOST_PARAMETERS[platform.device().type]
    outside = whole - one_layer * arch.num_layers
    layers = int(max(2, min(arch.num_layers, (most - outside) / one_layer)))
    hf.num_hidden_layers = min(layers, arch.num_layers)
    folder = scratch / "model"
    _say(f"a random model of {hf.num_hidden_layers} of {arch.num_layers} layers")
    save_random_model(folder, hf, dtype=DTYPES[config.model.dtype])
    settings = config.model_dump(mode="json")
    settings["model"]["path"] = str(folder)
    settings["parallel"] = {}
    settings["logging"] |= {"tensorboard": False}
    settings["rollout"] |= {
        "engine": "in_process",
        "weight_sync": "disk",
        "ahead": 0,
        "function": None,
        "top_k": None,
    }
    settings["optimizer"] |= {"distributed": False, "offload": False, "overlap_grad_reduce": False}
    settings["optimizer"] |= {"overlap_param_gather": False}
    settings["policy"] |= {"minibatches": 1, "epochs": 1, "mismatch_abort": None}
    settings["run"] |= {"output_dir": str(scratch / "run")}
    return RunConfig.model_validate(settings)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info("calibrating: %s", text)


def _measure(
    config: RunConfig, measured: RunConfig, runtime: Runtime, assumed: Assumptions, scratch: Path
) -> dict[str, Any] | None:
    plan = resolve_plan(measured, runtime.world_size)
    sizes = _sizes(config, assumed, runtime.world_size)
    _say("products and copies")
    ceilings = measure_ceilings(DTYPES[config.model.dtype])
    peak, bandwidth = _least(ceilings.flops), _least(ceilings.bytes)
    device = platform.device().type
    found: dict[str, Any] = {
        "device": device,
        "gpus_per_node": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "memory_gib": _memory_gib(),
        "matmul_flops": {config.model.dtype: peak},
        "memory_bandwidth": bandwidth,
        "bandwidth_efficiency": 1.0,
        "link_efficiency": 1.0,
        "expert_efficiency": 1.0,  # products of experts are in the forward that was measured
    }
    if device == "cpu":  # nothing goes on beside the computation; what is there of other links is memory
        found |= {"overlap": 0.0, "row_overhead": 0.0, "host_bandwidth": bandwidth}
    timers = Timers()
    trainer = Trainer(
        measured, runtime, score_token_id=_SCORE_TOKEN if config.laser.enabled else None, timers=timers
    )
    found |= _links(runtime, bandwidth)
    found |= _training(plan, trainer, timers, sizes, found, runtime)
    engine = None
    if runtime.is_main:
        engine = InProcessEngine(
            measured.model.path,
            dtype=DTYPES[config.model.dtype],
            device=platform.device(),
            max_batch_size=max(config.rollout.samples_per_prompt, config.rollout.max_batch_size),
        )
        if config.rollout.engine == "in_process":
            layers = read_architecture(config.model.path).num_layers
            found |= _decoding(config, plan, engine, sizes, found, layers)
    found |= _sync(plan, trainer, engine, bandwidth)
    if runtime.is_main:
        found |= _host(config, scratch)
    _together(runtime)
    if not runtime.is_main:
        return None
    found["sources"] = _sources(found, plan, sizes, runtime.world_size)
    return found if device == "cpu" else {"base": _nearest(), **found}


def _sizes(config: RunConfig, assumed: Assumptions, ranks: int) -> _Sizes:
    """Batches of whole groups: about what one micro-batch of each rank takes, and less of it."""
    responses = assumed.lengths(config.rollout.max_new_tokens)
    response = max(2, round(sum(responses) / len(responses)))
    prompt = max(2, min(config.data.max_prompt_tokens, round(assumed.prompt_tokens)))
    samples = config.rollout.samples_per_prompt
    room = max(2, micro_batch_tokens(config) // (samples * (prompt + response)))
    most = max(2, min(room, -(-config.rollout.prompts_per_step // ranks)))
    return _Sizes((ranks * most, ranks * max(1, most // 3)), samples, prompt, response)


def _links(runtime: Runtime, memory: float) -> dict[str, float]:
    """From one rank to the others, by all-reduces of two sizes; of one alone, as fast as memory."""
    if runtime.world_size == 1:
        return dict.fromkeys(("node_bandwidth", "network_bandwidth"), memory) | dict.fromkeys(
            ("node_latency", "network_latency"), 0.0
        )
    _say("all-reduces")
    seconds = []
    for size in _MESSAGES:
        tensor = torch.ones(size // 4, device=platform.device())
        _together(runtime)
        seconds.append(_median(functools.partial(dist.all_reduce, tensor)))
    ranks = runtime.world_size
    moved = 2 * (ranks - 1) / ranks * (_MESSAGES[1] - _MESSAGES[0])
    rate = _least(moved / max(_TINY, seconds[1] - seconds[0]))
    latency = _most(seconds[0])
    return dict.fromkeys(("node_bandwidth", "network_bandwidth"), rate) | dict.fromkeys(
        ("node_latency", "network_latency"), latency
    )


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


def _training(
    plan: Plan, trainer: Trainer, timers: Timers, sizes: _Sizes, found: Mapping[str, Any], runtime: Runtime
) -> dict[str, float]:
    """Passes over two batches: what grows with the tokens are products, the rest is overhead."""
    arch, peak = plan.architecture, next(iter(found["matmul_flops"].values()))
    large, small = (_passes(plan, trainer, timers, sizes, prompts, runtime) for prompts in sizes.prompts)
    each, overhead = _line(
        (large.flops, large.micro_batches, large.scores), (small.flops, small.micro_batches, small.scores)
    )
    head = max(_TINY, large.full - large.scores)
    grown = large.train - small.train
    grown -= 3 * overhead * (large.micro_batches - small.micro_batches)
    grown -= 3 * head * (1 - small.rows / large.rows)
    # What recomputation makes again is a forward, too.
    length = sizes.prompt + sizes.response
    again = recomputed_flops(arch, length, plan.config.model.recompute) / (
        arch.num_layers * (length * layer_flops_per_token(arch) + attention_flops(arch, length))
    )
    backward = grown / (large.flops - small.flops) - each * (1 + again)
    if backward <= 0.0:  # a machine that others use; a backward is two products
        backward = 2 * each
    passes = large.flops * (each * (1 + again) + backward) + 3 * (head + overhead * large.micro_batches)
    _say("the optimizer")
    optimizer = _median(functools.partial(_update, trainer))
    reduction = 0.0
    if runtime.world_size > 1:
        sent = 2 * (runtime.world_size - 1) / runtime.world_size * plan.bytes_per_rank.gradients
        reduction = found["node_latency"] + sent / found["node_bandwidth"]
    figures = {
        "forward_efficiency": 1 / (peak * each),
        "backward_efficiency": 2 / (peak * backward),
        "head_efficiency": head_flops(arch, 1) * large.rows / (peak * head),
        "layer_overhead": overhead / arch.num_layers,
        "optimizer_efficiency": moved_by_optimizer(plan) / (found["memory_bandwidth"] * optimizer),
        "step_overhead": max(0.0, large.train - passes - optimizer - reduction),
    }
    return {
        name: _most(value) if name.endswith("overhead") else _least(_share(value))
        for name, value in figures.items()
    }


def _share(value: float) -> float:
    """An efficiency that a machine file takes: what was too quick to be measured costs next to nothing."""
    return min(_MOST_EFFICIENCY, max(1e-6, value))


def _line(first: tuple[float, int, float], second: tuple[float, int, float]) -> tuple[float, float]:
    """(seconds of a FLOP, of a micro-batch besides) that both (FLOPs, micro-batches, seconds) have."""
    across = first[0] * second[1] - second[0] * first[1]
    each = (first[2] * second[1] - second[2] * first[1]) / across if across else 0.0
    overhead = (first[2] - first[0] * each) / first[1]
    if each <= 0.0 or overhead < 0.0:
        return first[2] / first[0], 0.0
    return each, overhead


def _passes(
    plan: Plan, trainer: Trainer, timers: Timers, sizes: _Sizes, prompts: int, runtime: Runtime
) -> _Timed:
    arch = plan.architecture
    _say(f"the trainer, {prompts} x {sizes.samples} responses of {sizes.prompt} + {sizes.response} tokens")
    flat = _rollouts(plan, sizes, prompts)
    batches = trainer.prepare(flat).micro_batches
    chunks = trainer.policy.chunks
    tokens = sum(batch.tokens.numel() for batch in batches)
    sequences = prompts * sizes.samples / runtime.data_size
    length = sizes.prompt + sizes.response
    attention = sequences * attention_flops(arch, length)
    if tokens < sequences * length:  # a group's prompt is packed once
        attention -= (sequences - prompts / runtime.data_size) * attention_flops(arch, sizes.prompt)
    _together(runtime)
    scores = _median(lambda: run_forward(chunks, batches, lambda one: one.only_scores()))
    full = _median(lambda: run_forward(chunks, batches, lambda one: one.without_entropy()))
    seconds = []
    for number in range(_BATCHES + 1):
        _together(runtime)
        trainer.run_batch(flat, number + 1)
        platform.synchronize()
        seconds.append(timers.collect()["time/train"])
    return _Timed(
        flops=arch.num_layers * (tokens * layer_flops_per_token(arch) + attention),
        rows=sequences * (sizes.response + 1),
        micro_batches=len(batches),
        scores=scores,
        full=full,
        train=statistics.median(seconds[1:]),
    )


def _rollouts(plan: Plan, sizes: _Sizes, prompts: int) -> FlatBatch:
    return random_rollouts(
        prompts=prompts,
        samples=sizes.samples,
        prompt=sizes.prompt,
        response=sizes.response,
        ids=(_SCORE_TOKEN + 1, plan.architecture.vocab_size),
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


def _decoding(
    config: RunConfig,
    plan: Plan,
    engine: InProcessEngine,
    sizes: _Sizes,
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
    _say(f"the engine, {rows} responses of {positions} tokens")

    def generate(count: int, samples: int, tokens: int) -> float:
        sampling = SamplingParams(
            samples_per_prompt=samples,
            max_new_tokens=tokens,
            stop_token_ids=(),
            temperature=rollout.temperature or 1.0,
            top_p=rollout.top_p,
            seed=1,
        )
        return _median(lambda: engine.generate(ids[:count], sampling, deadline=3600.0), everywhere=False)

    first = generate(prompts, rollout.samples_per_prompt, 1)
    many = (generate(prompts, rollout.samples_per_prompt, positions) - first) / (positions - 1)
    few_rows = max(1, rows // 4)
    few = (generate(1, few_rows, positions) - generate(1, few_rows, 1)) / (positions - 1)
    prefill = prompts * (
        arch.num_layers * (sizes.prompt * layer_flops_per_token(arch) + attention_flops(arch, sizes.prompt))
        + head_flops(arch, 1)
    )
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


def _sync(plan: Plan, trainer: Trainer, engine: InProcessEngine | None, bandwidth: float) -> dict[str, float]:
    _say("the weight sync")
    seconds = []
    for version in range(_ROUNDS + 1):
        started = time.perf_counter()
        sync_weights(trainer.weight_stream(), engine, version=version + 1)
        platform.synchronize()
        seconds.append(time.perf_counter() - started)
    copies = 2 * served_bytes(plan) / bandwidth
    tensors = len(tensor_shapes(plan.architecture))
    return {"tensor_overhead": max(0.0, statistics.median(seconds[1:]) - copies) / tensors}


def _host(config: RunConfig, scratch: Path) -> dict[str, float]:
    """What a response costs rank 0 besides, a file, and on a GPU the link to host memory."""
    _say("grading and the disk")
    file = scratch / "written"
    started = time.perf_counter()
    with file.open("wb") as out:
        out.write(bytes(_DISK_BYTES))
        out.flush()
        os.fsync(out.fileno())
    figures = {"disk_bandwidth": _DISK_BYTES / (time.perf_counter() - started)}
    file.unlink()
    if config.reward.function == "math_verify":
        with GradingPool(workers=1, deadline=config.reward.deadline) as pool:
            started = time.perf_counter()
            for number in range(_GRADED):
                pool.submit(f"The answer is \\boxed{{{number}}}.", str(number)).result()
            figures["request_overhead"] = (time.perf_counter() - started) / _GRADED
    else:  # a user's function may need what only a run has
        figures["request_overhead"] = 0.0
    if platform.has_cuda():
        source = torch.zeros(_DISK_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=platform.device())
        figures["host_bandwidth"] = _DISK_BYTES / seconds_per_call(lambda: target.copy_(source))
    return figures


def _memory_gib() -> float:
    if platform.has_cuda():
        return torch.cuda.get_device_properties(platform.device()).total_memory / 2**30
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks / 2**30


def _nearest() -> str:
    """The known machine whose servers' figures a file of this GPU takes."""
    name = platform.device_name().lower()
    return next((known for known in MACHINES if known in name), "h100")


def _median(call: Callable[[], object], *, everywhere: bool = True) -> float:
    """Seconds of one call, over as many as half a second has; the first does not count. `everywhere`: on all ranks."""

    def once() -> float:
        platform.synchronize()
        started = time.perf_counter()
        call()
        platform.synchronize()
        return time.perf_counter() - started

    once()
    first = once()
    rounds = _SAMPLE_SECONDS / max(_TINY, _most(first) if everywhere else first)
    return statistics.median([first, *(once() for _ in range(max(2, min(30, round(rounds)))))])


def _together(runtime: Runtime) -> None:
    if runtime.world_size > 1:
        dist.barrier(group=runtime.cpu_group)


def _least(value: float) -> float:
    """Of all ranks: a step waits for the slowest."""
    return _over_ranks(value, dist.ReduceOp.MIN)


def _most(value: float) -> float:
    return _over_ranks(value, dist.ReduceOp.MAX)


def _over_ranks(value: float, operation: Any) -> float:
    if dist.get_world_size() == 1:
        return float(value)
    tensor = torch.tensor([value], dtype=torch.float64, device=platform.device())
    dist.all_reduce(tensor, op=operation)
    return float(tensor)


def _sources(found: Mapping[str, Any], plan: Plan, sizes: _Sizes, ranks: int) -> dict[str, str]:
    words = (
        f"measured on {ranks} ranks with {plan.architecture.num_layers} layers of the run's model, "
        f"{sizes.prompt} + {sizes.response} tokens"
    )
    stated = {
        "bandwidth_efficiency": "of a copy that was measured",
        "link_efficiency": "of an all-reduce that was measured",
        "expert_efficiency": "in the forward that was measured",
        "overlap": "nothing goes on beside the computation of a CPU",
        "row_overhead": "in decode_efficiency",
        "memory_gib": "what the system says, for each rank",
        "gpus_per_node": "ranks on this machine",
    }
    return {name: stated.get(name, words) for name in found if name != "device"}
