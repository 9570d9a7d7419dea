"""What a GPU, and the machine around it, can do: three that are known, or a file of one's own.

`matmul_flops`, `memory_bandwidth` and the links are what the maker says; the efficiencies are what of it a phase is
assumed to reach, and overheads what the arithmetic cannot see. A file that `megatron-laser plan --calibrate` wrote has
measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_laser.config.plan.lines import Device
from megatron_laser.config.yaml_source import read_yaml
from megatron_laser.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Machine:
    """One kind of GPU (or CPU rank) in nodes of several.

    matmul_flops: FLOP/s by dtype (`bfloat16`, `float32`, `fp8`), dense. memory_bandwidth: B/s. node_bandwidth: B/s from
    one GPU to others of its node; network_bandwidth: to other nodes; host_bandwidth: to host memory; disk_bandwidth:
    B/s that one node writes and reads. Latencies are of one collective, in seconds.

    forward_efficiency, backward_efficiency: share of `matmul_flops` that training passes reach in layers;
    expert_efficiency: share of these that products of single experts reach; head_efficiency: of `matmul_flops` in the
    vocabulary projection with its log-softmax; prefill_efficiency, decode_efficiency: of servers where compute bounds
    them; bandwidth_efficiency: share of `memory_bandwidth` in decoding and copies; link_efficiency: share of a link.
    overlap: share of the gradients' reduction and of rings that hides behind compute.

    layer_overhead: seconds of each layer in each pass of a micro-batch that are no arithmetic; step_overhead: of an
    optimizer step; decode_overhead: of one decoded position of a batch, whatever its size; row_overhead: of each
    sequence in it besides its arithmetic; request_overhead: of one response on a server's or engine's host, which are
    not side by side. optimizer_efficiency: share of `memory_bandwidth` in the optimizer's update, where it is not that
    of decoding. tensor_overhead: seconds of each tensor in a weight sync, besides its bytes.

    sources: where each number is from, by field.
    """

    name: str
    device: Device
    gpus_per_node: int
    memory_gib: float
    matmul_flops: Mapping[str, float]
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    disk_bandwidth: float
    node_latency: float
    network_latency: float
    forward_efficiency: float
    backward_efficiency: float
    expert_efficiency: float
    head_efficiency: float
    prefill_efficiency: float
    decode_efficiency: float
    bandwidth_efficiency: float
    link_efficiency: float
    overlap: float
    layer_overhead: float
    step_overhead: float
    decode_overhead: float
    row_overhead: float
    request_overhead: float
    price_per_gpu_hour: float | None = None
    optimizer_efficiency: float | None = None
    tensor_overhead: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def flops(self, dtype: str) -> float:
        """FLOP/s of products in `dtype`. Raises ConfigError where the machine does not say."""
        if dtype not in self.matmul_flops:
            known = ", ".join(sorted(self.matmul_flops))
            raise ConfigError(
                [f"machine {self.name}: matmul_flops has no {dtype}, only {known}; add it to its file"]
            )
        return self.matmul_flops[dtype]

    def bandwidth(self, ranks: int, stride: int | None = None) -> float:
        """B/s that one of `ranks` neighbouring ranks sends to the others with, efficiency included.

        stride: a ring goes through every `stride`-th of them, and through the ports of all that it has in a node.
        None: each rank sends through its own port.
        """
        if ranks <= self.gpus_per_node:
            return self.node_bandwidth * self.link_efficiency
        ports = 1 if stride is None else max(1, self.gpus_per_node // stride)
        return min(self.node_bandwidth, ports * self.network_bandwidth) * self.link_efficiency

    def latency(self, ranks: int) -> float:
        """Seconds of one collective of so many neighbouring ranks, besides its bytes."""
        return self.node_latency if ranks <= self.gpus_per_node else self.network_latency

    def lines(self) -> list[str]:
        """`field: value (source)` of every number, as one would write it."""
        found = []
        for one in fields(self):
            if one.name in ("name", "sources"):
                continue
            value = getattr(self, one.name)
            if value is None:
                continue
            words = (
                ", ".join(f"{key} {number:.4g}" for key, number in value.items())
                if isinstance(value, Mapping)
                else (f"{value:.4g}" if isinstance(value, float) else str(value))
            )
            source = self.sources.get(one.name)
            found.append(f"{one.name}: {words}" + (f" ({source})" if source else ""))
        return found


_ASSUMED = {
    "forward_efficiency": "assumed: dense passes of Megatron-LM report 40 to 50 % MFU on Hopper",
    "backward_efficiency": "assumed, as the forward",
    "expert_efficiency": "assumed: grouped products with a few hundred rows each, and the sorting of tokens",
    "head_efficiency": "assumed: products as large as these, less the softmax between them",
    "prefill_efficiency": "assumed",
    "decode_efficiency": "assumed: products with few rows",
    "bandwidth_efficiency": "assumed: kernels that only read reach 80 to 90 %",
    "link_efficiency": "assumed: what large messages of NCCL reach of the maker's number",
    "overlap": "assumed",
    "layer_overhead": "assumed: launches of a layer's kernels that the device waits for",
    "step_overhead": "assumed",
    "decode_overhead": "assumed: a server's scheduler and sampling beside a CUDA graph",
    "row_overhead": "assumed",
    "request_overhead": "assumed: detokenizing and HTTP, in processes of their own",
    "node_latency": "assumed: a small NCCL all-reduce in a node",
    "network_latency": "assumed: a small NCCL all-reduce between nodes",
    "disk_bandwidth": "assumed: a parallel file system, from one node",
    "network_bandwidth": "one 400 Gb/s port for each GPU",
}

_HOPPER = Machine(
    name="h100",
    device="cuda",
    gpus_per_node=8,
    memory_gib=79.1,
    matmul_flops={"bfloat16": 989e12, "float32": 67e12, "fp8": 1979e12},
    memory_bandwidth=3.35e12,
    node_bandwidth=450e9,
    network_bandwidth=50e9,
    host_bandwidth=55e9,
    disk_bandwidth=2e9,
    node_latency=10e-6,
    network_latency=40e-6,
    forward_efficiency=0.45,
    backward_efficiency=0.45,
    expert_efficiency=0.5,
    head_efficiency=0.5,
    prefill_efficiency=0.45,
    decode_efficiency=0.45,
    bandwidth_efficiency=0.7,
    link_efficiency=0.75,
    overlap=0.7,
    layer_overhead=60e-6,
    step_overhead=0.05,
    decode_overhead=1e-3,
    row_overhead=2e-6,
    request_overhead=0.0,
    sources={
        "matmul_flops": "NVIDIA's data sheet of the H100 SXM, dense",
        "memory_bandwidth": "NVIDIA's data sheet of the H100 SXM",
        "memory_gib": "what an H100 of 80 GB shows",
        "node_bandwidth": "NVLink 4, 900 GB/s in both directions together",
        "host_bandwidth": "PCIe 5 x16, less its protocol",
        **_ASSUMED,
    },
)
MACHINES: Mapping[str, Machine] = {
    "h100": _HOPPER,
    "h200": replace(
        _HOPPER,
        name="h200",
        memory_gib=139.8,
        memory_bandwidth=4.8e12,
        sources={
            **_HOPPER.sources,
            "memory_bandwidth": "NVIDIA's data sheet of the H200 SXM",
            "memory_gib": "what an H200 of 141 GB shows",
        },
    ),
    "b200": replace(
        _HOPPER,
        name="b200",
        memory_gib=178.0,
        matmul_flops={"bfloat16": 2250e12, "float32": 80e12, "fp8": 4500e12},
        memory_bandwidth=8e12,
        node_bandwidth=900e9,
        forward_efficiency=0.4,
        backward_efficiency=0.4,
        sources={
            **_HOPPER.sources,
            "matmul_flops": "NVIDIA's data sheet of the HGX B200, dense, for one GPU",
            "memory_bandwidth": "NVIDIA's data sheet of the HGX B200, for one GPU",
            "memory_gib": "what of 180 GB is left to a program",
            "node_bandwidth": "NVLink 5, 1.8 TB/s in both directions together",
            "forward_efficiency": "assumed: a little less of a higher peak",
            "backward_efficiency": "assumed: a little less of a higher peak",
        },
    ),
}
_SHARES = ("overlap",)
_OPTIONAL = ("price_per_gpu_hour", "optimizer_efficiency")
_EFFICIENCIES = tuple(one.name for one in fields(Machine) if one.name.endswith("_efficiency"))
_OVERHEADS = tuple(one.name for one in fields(Machine) if one.name.endswith(("_overhead", "_latency")))


def read_machine(name_or_file: str | Path) -> Machine:
    """A known machine, or one from a YAML file of `Machine`'s fields; `base: h100` takes what it leaves out from there.

    Raises:
        ConfigError: no such machine or file, or fields that are missing, unknown or impossible.
    """
    known = MACHINES.get(str(name_or_file).lower())
    if known is not None:
        return known
    path = Path(name_or_file)
    names = ", ".join(MACHINES)
    if not path.is_file():
        raise ConfigError([f"machine {name_or_file}: no such machine or file; known are {names}"])
    data = dict(read_yaml(path).data)
    problems: list[str] = []
    base = data.pop("base", None)
    base = base.lower() if isinstance(base, str) else base
    if base is not None and str(base) not in MACHINES:
        raise ConfigError([f"base: {base!r} is none of {names}"], str(path))
    allowed = {one.name for one in fields(Machine)}
    problems += [
        f"{name}: no such field; there are {', '.join(sorted(allowed))}"
        for name in data
        if name not in allowed
    ]
    given: dict[str, Any] = {}
    for name, value in data.items():
        if name in allowed:
            given[name] = _field(name, value, problems)
    given.setdefault("name", path.stem)
    if base is None:
        needed = {one.name for one in fields(Machine) if one.default is MISSING} - {"sources"} - given.keys()
        problems += [f"{name}: missing; set it, or `base: h100` to take an H100's" for name in sorted(needed)]
    if problems:
        raise ConfigError(problems, str(path))
    sources = {name: path.name for name in given if name not in ("name", "sources")}
    own = dict(given.pop("sources", {}))
    if base is None:
        return Machine(**given, sources={**sources, **own})
    start = MACHINES[str(base)]
    return replace(start, **given, sources={**start.sources, **sources, **own})


def _field(name: str, value: Any, problems: list[str]) -> Any:
    if name in ("name", "device"):
        if not isinstance(value, str) or (name == "device" and value not in ("cuda", "cpu")):
            problems.append(f"{name}: {value!r}, expected {'cuda or cpu' if name == 'device' else 'a text'}")
        return value
    if name in ("matmul_flops", "sources"):
        if not isinstance(value, dict) or not value:
            problems.append(f"{name}: {value!r}, expected names and their values")
            return {}
        if name == "matmul_flops":
            return {
                str(key): _number(f"{name}.{key}", rate, problems, above=0.0) for key, rate in value.items()
            }
        return {str(key): str(text) for key, text in value.items()}
    if name in _OPTIONAL and value is None:
        return None
    if name == "gpus_per_node":
        if type(value) is not int or value < 1:
            problems.append(f"{name}: {value!r}, expected a whole number, 1 or more")
        return value
    if name in _SHARES:
        return _number(name, value, problems, least=0.0, most=1.0)
    if name in _EFFICIENCIES:  # a measured one may pass 1: of what another measurement called the peak
        return _number(name, value, problems, above=0.0, most=4.0)
    if name in _OVERHEADS or name == "price_per_gpu_hour":
        return _number(name, value, problems, least=0.0)
    return _number(name, value, problems, above=0.0)


def _number(
    name: str,
    value: Any,
    problems: list[str],
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan  # YAML reads 3e12 as a text
    except (TypeError, ValueError):
        number = math.nan
    fits = math.isfinite(number)
    fits = fits and (above is None or number > above) and (least is None or number >= least)
    if not fits or (most is not None and number > most):
        bounds = f"more than {above:g}" if above is not None else f"{least:g} or more"
        limit = f", at most {most:g}" if most is not None else ""
        problems.append(f"{name}: {value!r}, expected a number, {bounds}{limit}")
    return number
