"""The layouts that are worth trying: who trains and who generates, how the trainer is cut, what memory is saved how.

Everything here is a proposal. Whether it can run is said by the project's own checks, and whether it fits by the dry
run's memory sum, both in `config/plan/resolve.py:another_layout`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_laser.config.derived import longest_sequence
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.parameters import DTYPE_BYTES, count_parameters
from megatron_laser.config.model_folder.quantized import quantized_bytes
from megatron_laser.config.plan.memory import MEM_FRACTION_STATIC
from megatron_laser.config.plan.resolve import Plan, another_layout
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.server_options import server_option
from megatron_laser.errors import ConfigError
from megatron_laser.logprob_memory import GIB
from megatron_laser.planner.machine import Machine
from megatron_laser.planner.run_file import changed

IN_PROCESS_PARAMETERS = 3_000_000_000
"""From here on rank 0 alone would generate for hours (docs/scaling.md)."""
MOST_SPLITS = 15
SERVER_REST = 4 * GIB
"""Of a server's GPU beside weights and cache: context, graphs, activations of a prefill. An allowance."""


@dataclass(frozen=True, slots=True)
class Split:
    """Who has how many GPUs: `trainer` ranks, and `servers` GPUs that only generate (0: it shares its own)."""

    trainer: int
    servers: int
    engine: str  # apart, colocated, in_process, or none: nobody generates


@dataclass(frozen=True, slots=True)
class Shape:
    """How the trainer's ranks are cut; what is left of them is data."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def ranks(self) -> int:
        """Ranks of one copy of the model, experts aside."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that can run, and whether it fits is asked of `plan.memory`."""

    plan: Plan
    split: Split
    shape: Shape

    @property
    def gpus(self) -> int:
        """All GPUs of the run."""
        return self.split.trainer + self.split.servers


def splits(config: RunConfig, architecture: Architecture, gpus: int, machine: Machine) -> list[Split]:
    """Ways to share out `gpus`: whole nodes where there are several, else any; a few even steps of very many.

    Raises:
        ConfigError: no number of whole nodes.
    """
    node = machine.gpus_per_node
    if gpus > node and gpus % node:
        raise ConfigError(
            [
                f"--gpus {gpus}: more than one node of {node}, expected whole nodes: {gpus // node * node} or "
                f"{-(-gpus // node) * node}"
            ]
        )
    if config.rollout.engine == "none":  # recorded batches: all GPUs train
        return [Split(gpus, 0, "none")]
    unit = node if gpus > node else 1
    parts = gpus // unit
    counts = list(range(1, parts))
    if len(counts) > MOST_SPLITS:
        counts = sorted({max(1, round(parts * step / 16)) for step in range(1, 16)})
    found = [Split(unit * count, gpus - unit * count, "apart") for count in counts]
    if gpus == 1 and machine.device == "cuda":
        found.append(Split(1, 0, "colocated"))  # several GPUs are refused when servers start
    if count_parameters(architecture) < IN_PROCESS_PARAMETERS and config.rollout.function is None:
        found.append(Split(gpus, 0, "in_process"))
    return found


def between(split: Split, other: Split, machine: Machine, gpus: int) -> Split | None:
    """The split in the middle of two, in whole nodes; None where there is none."""
    unit = machine.gpus_per_node if gpus > machine.gpus_per_node else 1
    middle = (split.trainer + other.trainer) // 2 // unit * unit
    return None if middle in (split.trainer, other.trainer) else Split(middle, gpus - middle, "apart")


def server_tensors(config: RunConfig, architecture: Architecture, gpus: int, machine: Machine) -> list[int]:
    """GPUs of one server: those that hold the weights with room for one of the longest sequences, fewest first."""
    sglang = config.rollout.sglang
    size = DTYPE_BYTES[config.model.dtype]
    held = (
        quantized_bytes(architecture, size) if sglang.quantization else count_parameters(architecture) * size
    )
    width = architecture.num_key_value_heads * architecture.head_dim
    cache = 2 * architecture.num_layers * width * size * longest_sequence(config)
    given = server_option(sglang.options, "mem_fraction_static", None)
    static = (MEM_FRACTION_STATIC if given is None else float(given)) * machine.memory_gib * GIB
    most = min(gpus, machine.gpus_per_node)
    heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
    return [
        tensor
        for tensor in _powers(most)
        if heads % tensor == 0 and gpus % tensor == 0 and most % tensor == 0
        if held / tensor + cache / min(tensor, kv_heads) <= static
        if machine.device != "cuda" or held / tensor + SERVER_REST <= machine.memory_gib * GIB
    ]


def engine_settings(config: RunConfig, split: Split, tensor: int, machine: Machine) -> dict[str, Any]:
    """What `rollout` says of a split, with servers of `tensor` GPUs."""
    rollout = config.rollout
    if split.engine in ("in_process", "none"):
        return {"rollout.engine": split.engine}
    settings: dict[str, Any] = {"rollout.engine": "sglang", "rollout.sglang.tensor": tensor}
    if split.engine == "colocated":
        return settings | {
            "rollout.weight_sync": "colocated",
            "rollout.min_servers": min(rollout.min_servers, split.trainer // tensor),
            "rollout.sglang.servers": split.trainer // tensor,
            "rollout.sglang.urls": None,
            "rollout.sglang.endpoints": None,
            "rollout.sglang.router": False,
        }
    servers = split.servers // tensor
    settings["rollout.sglang.servers"] = min(split.servers, machine.gpus_per_node) // tensor
    if rollout.weight_sync == "colocated":
        settings["rollout.weight_sync"] = "distributed"
    if rollout.sglang.urls is not None and len(rollout.sglang.urls) != servers:
        settings |= {"rollout.sglang.urls": None, "rollout.sglang.router_url": None}
    if rollout.sglang.endpoints is None and settings.get("rollout.sglang.urls", rollout.sglang.urls) is None:
        folder = config.run.output_dir
        settings["rollout.sglang.endpoints"] = folder.with_name(folder.name + "_servers")
    if rollout.min_servers > servers:
        settings["rollout.min_servers"] = max(1, servers // 2)  # a run goes on with half of them
    return settings


def shapes(
    config: RunConfig, architecture: Architecture, trainer: int, machine: Machine, wide: bool
) -> Iterator[Shape]:
    """Cuts of `trainer` ranks. `wide`: also those that only make sense where nothing else fits, such as tensor-parallel
    groups across nodes."""
    node = machine.gpus_per_node
    longest = longest_sequence(config)
    contexts = [1, 2] if longest > 4096 else [1]
    while longest / contexts[-1] > (8192 if wide else 32768):
        contexts.append(2 * contexts[-1])
    moe = architecture.moe
    for tensor in _powers(min(trainer, 4 * node if wide else node)):
        for context in contexts:
            for pipeline in _powers(min(16, architecture.num_layers)):
                shape = Shape(tensor, pipeline, 1, context)
                if trainer % shape.ranks:
                    continue
                if moe is None:
                    yield shape
                    continue
                stage = trainer // pipeline
                for expert in _powers(min(moe.num_experts, stage, 8 * node if wide else node)):
                    for inner in (1, 2, 4) if wide else (1,):
                        if moe.num_experts % expert == 0 and stage % (expert * inner) == 0:
                            yield Shape(tensor, pipeline, 1, context, expert, inner)


def shape_settings(architecture: Architecture, shape: Shape) -> dict[str, Any]:
    """What `parallel` says of a shape."""
    settings: dict[str, Any] = {
        "parallel.tensor": shape.tensor,
        "parallel.sequence": shape.tensor > 1,
        "parallel.pipeline": shape.pipeline,
        "parallel.virtual_pipeline": shape.virtual,
        "parallel.context": shape.context,
        "parallel.expert": shape.expert,
        "parallel.expert_tensor": shape.expert_tensor,
    }
    even = architecture.num_layers % (shape.pipeline * shape.virtual) == 0
    settings["parallel.stage_layers"] = "even" if even else "balanced"
    return settings


def budgets(config: RunConfig, context: int) -> list[int]:
    """Tokens of a micro-batch on a rank: as set, twice and half of it, and the least that holds a longest sequence."""
    least = -(-longest_sequence(config) // (1024 * context)) * 1024
    given = config.batching.tokens_per_micro_batch
    return sorted({max(least, given), max(least, 2 * given), max(least, given // 2), least})


def ladder(architecture: Architecture) -> list[Mapping[str, Any]]:
    """Ways to save memory that change no number, the cheapest first: without `optimizer.offload`, then with it."""
    recomputed = (
        ["none", ("moe_act", "layernorm"), ("mlp",), "full"]
        if architecture.moe
        else ["none", ("mlp",), "full"]
    )
    rungs: list[Mapping[str, Any]] = [
        {
            "model.recompute": recompute,
            "model.recompute_layers": None,
            "model.offload_activations": False,
            "optimizer.offload": away,
        }
        for away in (False, True)
        for recompute in recomputed
    ]
    return [*rungs, {**rungs[-1], "model.offload_activations": True}]


class Proposer:
    """Makes candidates of a run, and keeps the smallest that did not fit for the message that nothing does."""

    def __init__(self, base: Plan, machine: Machine, share: float) -> None:
        """share: of a GPU's memory that the sum may take."""
        self.base, self.machine = base, machine
        self._room = share * machine.memory_gib * GIB
        self.smallest: Candidate | None = None
        self.problems: tuple[str, ...] = ()  # of the first layout that the checks refused
        self.tried = self.impossible = self.too_large = 0

    def candidate(self, split: Split, shape: Shape, settings: Mapping[str, Any]) -> Candidate | None:
        """None where the project's checks refuse it."""
        self.tried += 1
        config = changed(self.base.config, {**shape_settings(self.base.architecture, shape), **settings})
        try:
            plan = another_layout(self.base, config, split.trainer)
        except ConfigError as error:
            self.impossible += 1
            self.problems = self.problems or error.problems
            return None
        found = Candidate(plan, split, shape)
        if self.smallest is None or plan.memory.total < self.smallest.plan.memory.total:
            self.smallest = found
        return found

    def fits(self, candidate: Candidate) -> bool:
        """Whether the sum is within the share of a GPU that was asked for."""
        return candidate.plan.memory.total <= self._room

    def fitting(self, split: Split, shape: Shape, budget: int, tensor: int) -> list[Candidate]:
        """The cheapest ways in which a shape fits, one without `optimizer.offload` and one with, if that saves work."""
        config, rungs = self.base.config, ladder(self.base.architecture)
        given = {
            **engine_settings(config, split, tensor, self.machine),
            "batching.tokens_per_micro_batch": budget,
            "optimizer.distributed": True,
        }
        thriftiest = self.candidate(split, shape, {**given, **rungs[-1]})
        if thriftiest is None:
            return []
        if not self.fits(thriftiest):
            self.too_large += 1
            return []
        found: list[Candidate] = []
        kept = [rung for rung in rungs if not rung["optimizer.offload"]]
        away = [rung for rung in rungs if rung["optimizer.offload"]]
        for level, rung in enumerate(kept):
            one = self.candidate(split, shape, {**given, **rung})
            if one is not None and self.fits(one):
                found.append(one)
                away = away[:level]  # state in host memory has to save recomputation
                break
        for rung in away:
            one = self.candidate(split, shape, {**given, **rung})
            if one is not None and self.fits(one):
                return [*found, one]
        return found


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]
