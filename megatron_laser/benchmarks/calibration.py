"""What this machine does with this project's own code, as the fields of a machine file (`planner/machine.py`).

A model of random weights with the run's widths, and of its layers as many as a calibration has time for, goes through
the trainer, the in-process engine and the weight sync, with batches of the run's sizes. All ranks work at once, as they
do in a run, so that what they take from each other is in the figures; the engine works alone, as it does.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_laser.benchmarks.calibration_timing import (
    SCORE_TOKEN,
    Sizes,
    least,
    quick_seconds,
    say,
    time_decoding,
    time_sync,
    time_training,
    wait_for_all,
)
from megatron_laser.benchmarks.measure import measure_ceilings, seconds_per_call
from megatron_laser.benchmarks.random_model import save_random_model
from megatron_laser.config import read_architecture
from megatron_laser.config.derived import micro_batch_tokens
from megatron_laser.config.model_folder.parameters import count_parameters, tensor_shapes
from megatron_laser.config.plan.resolve import Plan, resolve_plan
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.yaml_text import yaml_text
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.model import platform
from megatron_laser.model.hf_config import read_hf_config
from megatron_laser.model.platform import DTYPES
from megatron_laser.observability.timers import Timers
from megatron_laser.planner.assumptions import Assumptions, read_assumptions
from megatron_laser.planner.machine import MACHINES, Machine
from megatron_laser.rewards.workers.grading_pool import GradingPool
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.trainer.trainer import Trainer

_MOST_PARAMETERS = {"cpu": 60e6, "cuda": 2e9}  # of the layers that are measured; a model is cut to these
_GRADED = 64
_MESSAGES = (2**12, 2**24)  # bytes of the all-reduces
_DISK_BYTES = 2**26


def machine_text(measured: Mapping[str, Any]) -> str:
    """What `calibrate` returned, as a machine file."""
    return yaml_text(dict(measured), width=120)


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
    say(f"a random model of {hf.num_hidden_layers} of {arch.num_layers} layers")
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


def _measure(
    config: RunConfig, measured: RunConfig, runtime: Runtime, assumed: Assumptions, scratch: Path
) -> dict[str, Any] | None:
    plan = resolve_plan(measured, runtime.world_size)
    sizes = _sizes(config, assumed, runtime.world_size)
    say("products and copies")
    ceilings = measure_ceilings(DTYPES[config.model.dtype])
    peak, bandwidth = least(ceilings.flops), least(ceilings.bytes)
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
        measured, runtime, score_token_id=SCORE_TOKEN if config.laser.enabled else None, timers=timers
    )
    found |= _links(runtime, bandwidth)
    found |= time_training(plan, trainer, timers, sizes, found, runtime)
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
            found |= time_decoding(config, plan, engine, sizes, found, layers)
    found |= time_sync(plan, trainer, engine, bandwidth)
    if runtime.is_main:
        found |= _host(config, scratch)
    wait_for_all(runtime)
    if not runtime.is_main:
        return None
    if device == "cuda":
        found = _beside_base(found, MACHINES[_nearest()], runtime.world_size)
    found["sources"] = _sources(found, plan, sizes, runtime.world_size)
    return found if device == "cpu" else {"base": _nearest(), **found}


def _beside_base(found: Mapping[str, Any], base: Machine, ranks: int) -> dict[str, Any]:
    """The figures of a GPU as those of `base` are meant: links that were not seen, and what a node is, stay its own.

    Ranks of one node say nothing of the network, ranks of several nothing of the node, and one alone of neither.
    """
    unseen = {"gpus_per_node", "link_efficiency"}
    if ranks == 1 or ranks > found["gpus_per_node"]:
        unseen |= {"node_bandwidth", "node_latency"}
    if ranks <= found["gpus_per_node"]:
        unseen |= {"network_bandwidth", "network_latency"}
    kept = {name: value for name, value in found.items() if name not in unseen}
    for name in ("node_bandwidth", "network_bandwidth", "host_bandwidth"):
        if name in kept:  # of which the base's share is taken again
            kept[name] /= base.link_efficiency
    return kept


def _sizes(config: RunConfig, assumed: Assumptions, ranks: int) -> Sizes:
    """Batches of whole groups: about what one micro-batch of each rank takes, and less of it."""
    responses = assumed.lengths(config.rollout.max_new_tokens)
    # Real batches should lie between the two that are timed: as long as responses may get, where there is room.
    response = max(2, round(sum(responses) / len(responses)))
    prompt = max(2, min(config.data.max_prompt_tokens, round(assumed.prompt_tokens)))
    samples = config.rollout.samples_per_prompt
    if 2 * samples * (prompt + config.rollout.max_new_tokens) <= micro_batch_tokens(config):
        response = config.rollout.max_new_tokens
    room = max(2, micro_batch_tokens(config) // (samples * (prompt + response)))
    most = max(2, min(room, -(-config.rollout.prompts_per_step // ranks)))
    return Sizes((ranks * most, ranks * max(1, most // 3)), samples, prompt, response)


def _links(runtime: Runtime, memory: float) -> dict[str, float]:
    """From one rank to the others, by all-reduces of two sizes; of one alone, as fast as memory."""
    if runtime.world_size == 1:
        return dict.fromkeys(("node_bandwidth", "network_bandwidth"), memory) | dict.fromkeys(
            ("node_latency", "network_latency"), 0.0
        )
    say("all-reduces")
    seconds = []
    for size in _MESSAGES:
        tensor = torch.ones(size // 4, device=platform.device())
        seconds.append(quick_seconds(functools.partial(dist.all_reduce, tensor), runtime))
    ranks = runtime.world_size
    moved = 2 * (ranks - 1) / ranks * (_MESSAGES[1] - _MESSAGES[0])
    rate = moved / max(1e-12, seconds[1] - seconds[0])
    return dict.fromkeys(("node_bandwidth", "network_bandwidth"), rate) | dict.fromkeys(
        ("node_latency", "network_latency"), seconds[0]
    )


def _host(config: RunConfig, scratch: Path) -> dict[str, float]:
    """What a response costs rank 0 besides, a file, and on a GPU the link to host memory."""
    say("grading and the disk")
    file = scratch / "written"
    started = time.perf_counter()
    with file.open("wb") as out:
        out.write(bytes(_DISK_BYTES))
        out.flush()
        os.fsync(out.fileno())
    figures = {"disk_bandwidth": _DISK_BYTES / (time.perf_counter() - started)}
    file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(str(config.model.path), local_files_only=True)
    ids = list(range(min(len(tokenizer), config.rollout.max_new_tokens)))
    figures["request_overhead"] = quick_seconds(lambda: tokenizer.decode(ids))
    if config.reward.function == "math_verify":  # a user's function may need what only a run has
        with GradingPool(workers=1, deadline=config.reward.deadline) as pool:
            started = time.perf_counter()
            for number in range(_GRADED):
                pool.submit(f"The answer is \\boxed{{{number}}}.", str(number)).result()
            figures["request_overhead"] += (time.perf_counter() - started) / _GRADED
    if platform.has_cuda():
        source = torch.zeros(_DISK_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=platform.device())
        figures["host_bandwidth"] = _DISK_BYTES / seconds_per_call(lambda: target.copy_(source))
    return figures


def _memory_gib() -> float:
    total = platform.total_memory_bytes()
    if total is not None:
        return total / 2**30
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks / 2**30


def _nearest() -> str:
    """The known machine whose servers' figures a file of this GPU takes."""
    name = platform.device_name().lower()
    return next((known for known in MACHINES if known in name), "h100")


def _sources(found: Mapping[str, Any], plan: Plan, sizes: Sizes, ranks: int) -> dict[str, str]:
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
