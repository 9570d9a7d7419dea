"""Trainer and servers on the same GPUs: what each has in device memory in each phase of a step.

    servers start   trainer: nothing                                     servers: measure what is free
    sync            trainer: parameters                                  servers: weights
    generate        trainer: nothing                                     servers: weights, key/value cache
    train           trainer: everything                                  servers: nothing
    save            trainer: parameters, optimizer state                 servers: weights

Whoever has to leave does so first, on all ranks, before anybody enters. Only `rollout.weight_sync: colocated` needs
this; for every other run the calls do nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.broadcast import barrier
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.model import platform
from megatron_laser.observability.timers import Timers
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.run.controller import Controller
from megatron_laser.run.ranks import Ranks
from megatron_laser.trainer.offload import ALL_PARTS, Part, StateOffload
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.weight_sync.server_memory import ALL_TAGS, WEIGHTS, ServerMemory

logger = logging.getLogger(__name__)

_NOTHING: frozenset[str] = frozenset()


class MemoryPhase(Enum):
    """What the GPUs are needed for; see the module's text."""

    SYNC = "sync"
    GENERATE = "generate"
    TRAIN = "train"
    SAVE = "save"


TRAINER_HOLDS: dict[MemoryPhase, frozenset[Part]] = {
    MemoryPhase.SYNC: frozenset({Part.PARAMETERS}),
    MemoryPhase.GENERATE: frozenset(),
    MemoryPhase.TRAIN: ALL_PARTS,
    MemoryPhase.SAVE: frozenset({Part.PARAMETERS, Part.OPTIMIZER}),
}
SERVERS_HOLD: dict[MemoryPhase, frozenset[str]] = {
    MemoryPhase.SYNC: frozenset({WEIGHTS}),
    MemoryPhase.GENERATE: ALL_TAGS,
    MemoryPhase.TRAIN: _NOTHING,
    MemoryPhase.SAVE: frozenset({WEIGHTS}),
}


class Colocation:
    """One rank's part in it. Every rank calls the same methods at the same edges of the loop."""

    def __init__(
        self,
        state: StateOffload | None,
        runtime: Runtime,
        timers: Timers,
        *,
        seconds: float,
        while_training: frozenset[Part] = ALL_PARTS,
    ) -> None:
        """
        Args:
            state: of this rank's trainer; None: nobody shares its device, and nothing is done.
            seconds: that a server may take for one change.
            while_training: what the trainer then has on the device from the start; it fetches the rest itself.
        """
        self._state = state
        self._trainer_holds = TRAINER_HOLDS | {MemoryPhase.TRAIN: while_training}
        self._runtime = runtime
        self._timers = timers
        self._seconds = seconds
        self._server_memory: ServerMemory | None = None

    def make_room(self) -> None:
        """Take everything of the trainer's off the device."""
        if self._state is not None:
            self._leave(self._state, frozenset(), "servers start")

    def switch_to(self, phase: MemoryPhase, ranks: Ranks) -> str:
        """Before `phase`: who has to leave leaves, who is needed enters.

        Returns:
            "" or, the same on every rank, why no server can generate: they have to be synced again.
        """
        if self._state is None:
            return ""
        with self._timers("turns"):
            leaving = ALL_TAGS - SERVERS_HOLD[phase]
            if leaving:
                ranks.run_on_controller(
                    f"{phase.value}: servers give back memory",
                    lambda controller: self._release(controller, phase),
                )
            with ranks.phase(f"{phase.value}: moving the trainer's state"):
                holds = self._trainer_holds[phase]
                self._leave(self._state, holds, phase.value)
                taken = self._state.onload(holds)
                if taken:
                    _log(phase.value, f"the trainer took {_gib(taken)} for {_names(holds)}")
            if not SERVERS_HOLD[phase]:
                return ""
            return ranks.ask_controller(
                f"{phase.value}: servers take memory again",
                lambda controller: self._resume(controller, phase),
            )

    @contextmanager
    def during(self, phase: MemoryPhase, ranks: Ranks) -> Iterator[None]:
        """`phase` between two rollouts; a server that does not come back from it is found at the next one."""
        self.switch_to(phase, ranks)
        yield
        self.switch_to(MemoryPhase.GENERATE, ranks)

    def _leave(self, state: StateOffload, staying: frozenset[Part], phase: str) -> None:
        """Everything but `staying` leaves the device, on all ranks before any goes on: a server has several GPUs."""
        freed = state.offload(ALL_PARTS - staying)
        if freed:
            _log(phase, f"the trainer gave back {_gib(freed)}")
        barrier(self._runtime)

    def _release(self, controller: Controller, phase: MemoryPhase) -> None:
        tags = ALL_TAGS - SERVERS_HOLD[phase]
        self._of(controller).release(tags)
        _log(phase.value, f"servers gave back {', '.join(sorted(tags))}")

    def _resume(self, controller: Controller, phase: MemoryPhase) -> str:
        tags = SERVERS_HOLD[phase]
        trouble = self._of(controller).resume(tags)
        _log(phase.value, trouble or f"servers hold {', '.join(sorted(tags))}")
        return trouble

    def _of(self, controller: Controller) -> ServerMemory:
        if self._server_memory is None:
            assert isinstance(controller.engine, SglangEngine)
            self._server_memory = ServerMemory(controller.engine, seconds=self._seconds)
        return self._server_memory


def open_colocation(config: RunConfig, runtime: Runtime, trainer: Trainer, timers: Timers) -> Colocation:
    """What `rollout.weight_sync: colocated` needs; for other settings its calls do nothing.

    Call before servers start: they size their cache by what they find free, so the trainer leaves the device.
    """
    rollout = config.rollout
    shared = rollout.engine == "sglang" and rollout.weight_sync == "colocated"
    state = trainer.policy.memory if shared else None
    while_training = ALL_PARTS - {Part.OPTIMIZER} if config.optimizer.offload else ALL_PARTS
    colocation = Colocation(
        state, runtime, timers, seconds=rollout.sync_deadline, while_training=while_training
    )
    colocation.make_room()
    return colocation


def _log(phase: str, what: str) -> None:
    logger.info("colocated, phase %s: %s; %s free", phase, what, _gib(platform.free_memory_bytes()))


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"


def _names(parts: frozenset[Part]) -> str:
    return ", ".join(part.value for part in Part if part in parts)
