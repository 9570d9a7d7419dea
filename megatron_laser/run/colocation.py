"""Trainer and servers on the same GPUs take turns: what each has in device memory in each phase of a step.

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
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.distributed.transport import meet
from megatron_laser.model import platform
from megatron_laser.observability.timers import Timers
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.run.controller import Leader
from megatron_laser.run.ranks import Ranks
from megatron_laser.trainer.offload import ALL_PARTS, Part, Residency
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.weight_sync.server_memory import ALL_TAGS, WEIGHTS, Occupation

logger = logging.getLogger(__name__)

_NOTHING: frozenset[str] = frozenset()


class Turn(Enum):
    """What the GPUs are needed for; see the module's text."""

    SYNC = "sync"
    GENERATE = "generate"
    TRAIN = "train"
    SAVE = "save"


TRAINER_HOLDS: dict[Turn, frozenset[Part]] = {
    Turn.SYNC: frozenset({Part.PARAMETERS}),
    Turn.GENERATE: frozenset(),
    Turn.TRAIN: ALL_PARTS,
    Turn.SAVE: frozenset({Part.PARAMETERS, Part.OPTIMIZER}),
}
SERVERS_HOLD: dict[Turn, frozenset[str]] = {
    Turn.SYNC: frozenset({WEIGHTS}),
    Turn.GENERATE: ALL_TAGS,
    Turn.TRAIN: _NOTHING,
    Turn.SAVE: frozenset({WEIGHTS}),
}


class Turns:
    """One rank's part in the turns. Every rank calls the same methods at the same edges of the loop."""

    def __init__(
        self, residency: Residency | None, runtime: Runtime, timers: Timers, *, seconds: float
    ) -> None:
        """
        Args:
            residency: of this rank's trainer; None: nobody shares its device, and nothing is done.
            seconds: that a server may take for one change.
        """
        self._residency = residency
        self._runtime = runtime
        self._timers = timers
        self._seconds = seconds
        self._occupation: Occupation | None = None

    def make_room(self) -> None:
        """Take everything of the trainer's off the device."""
        if self._residency is not None:
            self._leave(self._residency, frozenset(), "servers start")

    def take(self, turn: Turn, ranks: Ranks) -> str:
        """Before `turn`: who has to leave leaves, who is needed enters.

        Returns:
            "" or, the same on every rank, why no server can generate: they have to be synced again.
        """
        if self._residency is None:
            return ""
        with self._timers("turns"):
            leaving = ALL_TAGS - SERVERS_HOLD[turn]
            if leaving:
                ranks.lead(
                    f"{turn.value}: servers give back memory", lambda leader: self._release(leader, turn)
                )
            with ranks.coordinator.phase(f"{turn.value}: moving the trainer's state"):
                self._leave(self._residency, TRAINER_HOLDS[turn], turn.value)
                taken = self._residency.load(TRAINER_HOLDS[turn])
                if taken:
                    _log(turn.value, f"the trainer took {_gib(taken)} for {_names(TRAINER_HOLDS[turn])}")
            if not SERVERS_HOLD[turn]:
                return ""
            return ranks.decide(
                f"{turn.value}: servers take memory again", lambda leader: self._resume(leader, turn)
            )

    @contextmanager
    def during(self, turn: Turn, ranks: Ranks) -> Iterator[None]:
        """`turn` between two rollouts; a server that does not come back from it is found at the next one."""
        self.take(turn, ranks)
        yield
        self.take(Turn.GENERATE, ranks)

    def _leave(self, residency: Residency, staying: frozenset[Part], turn: str) -> None:
        """Everything but `staying` leaves the device, on all ranks before any goes on: a server has several GPUs."""
        freed = residency.offload(ALL_PARTS - staying)
        if freed:
            _log(turn, f"the trainer gave back {_gib(freed)}")
        meet(self._runtime)

    def _release(self, leader: Leader, turn: Turn) -> None:
        tags = ALL_TAGS - SERVERS_HOLD[turn]
        self._of(leader).release(tags)
        _log(turn.value, f"servers gave back {', '.join(sorted(tags))}")

    def _resume(self, leader: Leader, turn: Turn) -> str:
        tags = SERVERS_HOLD[turn]
        trouble = self._of(leader).resume(tags)
        _log(turn.value, trouble or f"servers hold {', '.join(sorted(tags))}")
        return trouble

    def _of(self, leader: Leader) -> Occupation:
        if self._occupation is None:
            assert isinstance(leader.engine, SglangEngine)
            self._occupation = Occupation(leader.engine, seconds=self._seconds)
        return self._occupation


def open_turns(config: RunConfig, runtime: Runtime, trainer: Trainer, timers: Timers) -> Turns:
    """The turns that `rollout.weight_sync: colocated` needs; for other settings they do nothing.

    Call before servers start: they size their cache by what they find free, so the trainer leaves the device.
    """
    rollout = config.rollout
    shared = rollout.engine == "sglang" and rollout.weight_sync == "colocated"
    residency = Residency(trainer.policy, trainer.reference) if shared else None
    turns = Turns(residency, runtime, timers, seconds=rollout.sync_deadline)
    turns.make_room()
    return turns


def _log(turn: str, what: str) -> None:
    logger.info("turn %s: %s; %s free", turn, what, _gib(platform.free_memory_bytes()))


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"


def _names(parts: frozenset[Part]) -> str:
    return ", ".join(part.value for part in Part if part in parts)
