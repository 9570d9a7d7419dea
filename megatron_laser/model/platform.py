"""Where the model runs: CUDA, or a CPU made good enough for Megatron-Core 0.19.

With CUDA the functions for the device are thin calls to `torch.cuda`, and nothing in Megatron is changed here (layers
without Transformer Engine change two functions, see `megatron_patches`). Without it,
`install()` lets the same Megatron code run over gloo. Megatron names CUDA in four ways that matter
(`torch.cuda.current_device()`, `device="cuda"` in factories, CUDA streams, and `param.type()` compared with
"torch.cuda.FloatTensor"), so on a CPU

- the module-global name `torch` inside every loaded `megatron.core` module becomes a proxy that answers the
  first three (the real `torch` is untouched for everybody else);
- `Tensor.cuda()` returns the tensor itself and `Tensor.type()` reports the CUDA name: Megatron calls both on
  tensors, where no proxy can stand in between;
- the model-parallel RNG tracker keeps CPU generator states.

Code outside this module never names `torch.cuda`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import resource
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_laser.model.megatron_patches import patch_megatron

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STEPS_BETWEEN = 10

# Everything that is used later must be imported before the proxies are set: a module that is imported
# afterwards would see the real torch. Checkpoint strategies are imported lazily by Megatron.
_MODULES = (
    "megatron.core",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.transformer.moe.moe_layer",
)
_FACTORIES = (
    *("arange", "as_tensor", "tensor", "rand", "randn"),
    *("empty", "empty_like", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like"),
)
_installed = False


def has_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def device_count() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count()


def device() -> torch.device:
    """The device of this process's model: the current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def device_name() -> str:
    """The device's product name."""
    return torch.cuda.get_device_name() if has_cuda() else "CPU (gloo)"


def set_local_device(local_rank: int) -> None:
    """Bind this process to the node's CUDA device `local_rank`; nothing to do on a CPU."""
    if has_cuda():
        torch.cuda.set_device(local_rank)


def use_device(wanted: torch.device) -> None:
    """Bind the calling thread to a CUDA device: a new thread starts on device 0, whatever its process uses."""
    if wanted.type == "cuda":
        torch.cuda.set_device(wanted)


def collective_backend() -> str:
    """The process-group backend: NCCL with gloo for CPU tensors on CUDA, gloo otherwise."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


def synchronize() -> None:
    """Wait for the device's queued work; timers call it at phase edges."""
    if has_cuda():
        torch.cuda.synchronize()


def new_stream() -> Any:
    """A stream for copies beside the computation; None on a CPU, where there is nothing to be beside."""
    return torch.cuda.Stream() if has_cuda() else None


@contextlib.contextmanager
def beside(stream: Any) -> Iterator[Any]:
    """Work for `stream`, which begins when what is queued for the current one is done; None: here and now."""
    if stream is None:
        yield None
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream


def wait_for(event: Any) -> None:
    """Let the current stream's next work wait for `event`; None: it has happened."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def reset_peak_memory() -> None:
    """Start a new measurement of `peak_device_gib`."""
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()


def reset_peak_memory_bytes() -> int:
    """Start a new measurement of `peak_memory_bytes`; returns the bytes that are allocated now."""
    if not has_cuda():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory_bytes() -> int:
    """Most device bytes allocated at once since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if has_cuda() else 0


def free_memory_bytes() -> int:
    """Bytes of device memory that nobody has taken, this process's own cache excluded; of the host's on a CPU."""
    if has_cuda():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def total_memory_bytes() -> int | None:
    """Memory of this process's device in bytes; None on a CPU, whose memory is everybody's."""
    return int(torch.cuda.mem_get_info()[1]) if has_cuda() else None


def empty_cache() -> None:
    """Give memory that the allocator keeps for later back to the device, for other processes to take."""
    if has_cuda():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def collect_shared_memory() -> None:
    """Let go of memory that was shared with other processes and that they have closed."""
    if has_cuda():
        torch.cuda.ipc_collect()


def nccl_version() -> str | None:
    """The NCCL that this process's torch was built with, "2.27.5"; None on a CPU. Another one may be loaded."""
    return ".".join(map(str, torch.cuda.nccl.version())) if has_cuda() else None


def phase_range(name: str) -> contextlib.AbstractContextManager[object]:
    """An NVTX range, which tools such as nsys show; without one of them it costs a microsecond."""
    ranged: contextlib.AbstractContextManager[object] = torch.cuda.nvtx.range(name)
    return ranged


def record_allocations(entries: int) -> None:
    """Have the CUDA allocator keep so many of its last calls with their stacks; 0: no more."""
    if entries:
        torch.cuda.memory._record_memory_history(max_entries=entries)
    else:
        torch.cuda.memory._record_memory_history(enabled=None)


def dump_allocations(path: Path) -> None:
    """Write what `record_allocations` kept, for https://pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(str(path))


def memory_gib() -> dict[str, float]:
    """Peak resident memory of the process and peak allocated device memory, in GiB."""
    figures = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if has_cuda():
        figures["memory/peak_device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def install() -> None:
    """Make Megatron-Core run on this machine. Idempotent; changes nothing where CUDA is available."""
    global _installed
    for name in _MODULES:
        importlib.import_module(name)
    if _installed or has_cuda():
        return
    _installed = True
    proxy = _TorchProxy()
    loaded: list[tuple[str, Any]] = list(sys.modules.items())
    for name, module in loaded:
        if name.startswith("megatron.core") and getattr(module, "__dict__", {}).get("torch") is torch:
            module.torch = proxy
    _patch_tensor_methods()
    _patch_rng()
    patch_megatron()


class _Null:
    """A CUDA stream or event on a machine that has neither: every call is a no-op."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def query(self) -> bool:
        return True

    def record_event(self, event: _Null | None = None) -> _Null:
        return self

    def __enter__(self) -> _Null:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _CudaProxy(types.ModuleType):
    """What Megatron sees as `torch.cuda`; names that are not here fall through to the real one."""

    def __init__(self) -> None:
        super().__init__("torch.cuda on CPU")
        nothing = lambda *args, **kwargs: None  # noqa: E731
        null = lambda *args, **kwargs: _Null()  # noqa: E731
        self.current_device = lambda: torch.device("cpu")
        self.is_available = lambda: False
        self.synchronize = self.empty_cache = self.set_device = nothing
        self.Stream = self.Event = self.current_stream = self.default_stream = null
        self.stream = lambda stream: contextlib.nullcontext()
        self.manual_seed = torch.manual_seed
        self.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        self.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchProxy(types.ModuleType):
    """What Megatron sees as `torch`: factories place "cuda" tensors on the CPU, the rest is the real one."""

    def __init__(self) -> None:
        super().__init__("torch on CPU")
        self.cuda = _CudaProxy()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        if isinstance(wanted, int) or (wanted is not None and torch.device(wanted).type == "cuda"):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return call


def _patch_tensor_methods() -> None:
    original_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        if isinstance(answer, str) and answer.startswith("torch.") and not answer.startswith("torch.cuda."):
            return "torch.cuda." + answer.removeprefix("torch.")
        return answer

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


class CpuRngTracker:
    """Megatron's CudaRNGStatesTracker over the CPU generator: named states to fork into and return from."""

    def __init__(self) -> None:
        self.reset()

    def is_initialized(self) -> bool:
        """Whether any state was added."""
        return bool(self.states_)

    def reset(self) -> None:
        """Forget all states."""
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        """Name to generator state, a shallow copy."""
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Replace all states, for example from a checkpoint."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Add the state `name`, seeded with `seed`; both must be new."""
        if seed in self.seeds_ or name in self.states_:
            raise RuntimeError(f"RNG state {name!r} or seed {seed} was added before")
        self.seeds_.add(seed)
        keep = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(keep)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the state `name` inside the block."""
        keep = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(keep)


def _patch_rng() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def trim_host_memory(step: int) -> None:
    """Every few steps, give pages that are free inside the C heap back to the system.

    Tensors of ever different sizes leave holes in glibc's heap, which it does not return by itself: a run on a
    CPU grew by 20 MiB in 250 steps without holding anything more. Costs milliseconds. A no-op with another libc.
    """
    if step % _STEPS_BETWEEN == 0:
        trim = _malloc_trim()
        if trim is not None:
            trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
