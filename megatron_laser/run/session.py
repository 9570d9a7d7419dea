"""Joining a run and leaving it: process groups, coordinator, watchdog and signals around everything else."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.metadata
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist

from megatron_laser.config import ConfigError
from megatron_laser.config.plan.resolve import resolve_memory
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.distributed.coordinator import Coordinator
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.logprob_memory import GIB
from megatron_laser.model import platform
from megatron_laser.model.gradient_fusion import fuses_gradient_accumulation
from megatron_laser.model.machine import (
    host_memory_problems,
    memory_setting_problems,
    ranks_on_this_node,
)
from megatron_laser.model.transformer_engine import backend_variable_problems, use_transformer_engine
from megatron_laser.observability.timers import Timers
from megatron_laser.run.stop_signals import StopNow
from megatron_laser.run.stopping import Stopping

_FLASH_PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")
_STDERR = 2  # sys.stderr may be anything


@contextmanager
def session(config: RunConfig, timers: Timers, stopping: Stopping) -> Iterator[tuple[Runtime, Coordinator]]:
    """Join the run on this rank; an error inside is told to the other ranks before it goes on, and so is a stop.

    Raises ConfigError, on every rank, when any rank's machine cannot run `config`.
    """
    stopping.enter("joining the other ranks")
    runtime = runtimes.start(config)
    coordinator = Coordinator(
        runtime.store,
        runtime.rank,
        runtime.world_size,
        deadline=config.run.deadline,
        detail=lambda: "" if timers.current == "total" else timers.current,
        on_phase=stopping.enter,
        on_stop=stopping.signals.request,
    )
    coordinator.start_watchdog()
    stopping.signals.on_request(coordinator.request_stop)
    try:
        with coordinator.phase("checking the machine"):
            check_machine(config, runtime)
        yield runtime, coordinator
    except BaseException as error:
        if isinstance(error, StopNow):
            coordinator.stop_told()
            coordinator.close()
        else:
            coordinator.fail(error)
        if runtime.world_size == 1:  # else leaving the groups would wait for ranks that may be gone
            runtimes.stop()
        raise
    finally:
        stopping.signals.forget(coordinator.request_stop)
    coordinator.close()
    runtimes.stop()


def check_machine(config: RunConfig, runtime: Runtime) -> None:
    """Raise ConfigError, the same on every rank, if any rank's machine cannot run `config`. Call on every rank.

    It looks at Transformer Engine, its attention backend and variables, gradient accumulation fusion, and the device's
    memory against the dry run's sum.
    """
    own = machine_problems(config, runtime.world_size)
    found: list[list[str]] = [own]
    if runtime.world_size > 1:
        found = [[] for _ in range(runtime.world_size)]
        dist.all_gather_object(found, own, group=runtime.cpu_group)
    # Ranks of equal machines say the same: the first one's rank is enough.
    first: dict[str, int] = {}
    for rank, problems in enumerate(found):
        for problem in problems:
            first.setdefault(problem, rank)
    if first:
        raise ConfigError([f"{problem} (rank {rank})" for problem, rank in first.items()])


def machine_problems(config: RunConfig, world_size: int) -> list[str]:
    """What is missing on this rank's machine; one line each, with the setting."""
    model = config.model
    problems = backend_variable_problems(model.attention)
    try:
        fused = use_transformer_engine(model.layers)
        problems += memory_setting_problems(config)
        fuses_gradient_accumulation(config.optimizer.gradient_accumulation_fusion, transformer_engine=fused)
    except ConfigError as error:
        problems += error.problems
    else:
        if fused and model.attention == "flash" and not any(map(_installed, _FLASH_PACKAGES)):
            problems.append(
                f"model.attention: flash needs one of {', '.join(_FLASH_PACKAGES)}, and none is installed; "
                "install one, or use auto or fused"
            )
    return problems + _memory_problems(config, world_size)


def _memory_problems(config: RunConfig, world_size: int) -> list[str]:
    available = platform.total_memory_bytes()
    if available is None:
        return []
    memory = resolve_memory(config, world_size, available / GIB)
    asking = [
        f"{section}.{name}: true"
        for section, name in (("optimizer", "offload"), ("model", "offload_activations"))
        if getattr(getattr(config, section), name)
    ]
    problems = host_memory_problems(memory.host, ranks_on_this_node(), ", ".join(asking)) if asking else []
    try:
        memory.check(available)
    except ConfigError as error:
        problems += [f"{problem} (this GPU: {platform.device_name()})" for problem in error.problems]
    return problems


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextlib.contextmanager
def window_signal(request_window: Callable[[], None]) -> Iterator[None]:
    """Call `request_window` on SIGUSR2 inside the block; no-op outside the main thread."""
    with _on_signals((signal.SIGUSR2,), lambda name: request_window()):
        yield


@contextlib.contextmanager
def stack_signal() -> Iterator[None]:
    """SIGQUIT inside the block prints the Python stacks of all threads on stderr, and ends nothing.

    It is written from the signal itself, so that it works where no Python code gets to run. torchrun sends this signal
    to its workers only when it gets it.
    """
    faulthandler.register(signal.SIGQUIT, file=_STDERR, all_threads=True, chain=False)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGQUIT)


@contextlib.contextmanager
def _on_signals(numbers: tuple[signal.Signals, ...], call: Callable[[str], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        call(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
