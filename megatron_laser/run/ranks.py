"""One rank among the others in the training loop: what rank 0 does alone, and how its results reach all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.broadcast import broadcast_arrays, broadcast_text
from megatron_laser.distributed.coordinator import Coordinator
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.errors import UserError
from megatron_laser.evaluation.keeping import Judged
from megatron_laser.evaluation.validation import evaluation_due
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.run.controller import Controller
from megatron_laser.run.engines import NEEDS_WEIGHTS, STOPPED, WorkResult, uses_servers
from megatron_laser.run.export import export_name, is_exported
from megatron_laser.run.stop_signals import StopNow
from megatron_laser.run.stopping import Stopping

T = TypeVar("T")

# Seconds in which rank 0's work ends by itself after a request to stop: an engine lets go of what it generates.
_STOP_GRACE = 10.0


class RunEnded(UserError, RuntimeError):
    """The run cannot go on. Everything up to its last complete step is saved; the same command continues."""


class CannotGoOn(Exception):
    """Raised on every rank at once, with rank 0's reason. step: the last one that is complete."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step
        self.reason = reason


class StopRequested(CannotGoOn):
    """Somebody asks the run to stop, and rank 0 has left its work for that."""


@dataclass(frozen=True)
class Ranks:
    """One rank's view of the others; `controller` is None on all ranks but 0."""

    config: RunConfig
    runtime: Runtime
    coordinator: Coordinator
    controller: Controller | None
    stopping: Stopping

    @property
    def engine(self) -> RolloutEngine | None:
        """Rank 0's rollout engine; None elsewhere."""
        return None if self.controller is None else self.controller.engine

    def phase(self, name: str) -> AbstractContextManager[None]:
        """All ranks work together on `name`, which tables and errors then show; see `Coordinator.phase`."""
        return self.coordinator.phase(name)

    def request_stop(self, reason: str) -> None:
        """On a signal: stop after the current step; a rollout or an evaluation does not have to end before that."""
        self.coordinator.request_stop(reason)
        if self.controller is not None:
            self.controller.stop(reason)

    def run_on_controller(self, phase: str, work: Callable[[Controller], T]) -> T | None:
        """Rank 0 works while the others wait on the store."""
        return self.coordinator.run_on_rank_zero(
            phase, lambda: work(require_rank_zero(self.controller)), deadline=self._patience
        )

    def ask_controller(self, phase: str, work: Callable[[Controller], str]) -> str:
        """What `work` returns on rank 0, on every rank; `STOPPED` and the reason where a stop cut it off."""

        def interruptible(rank0: Controller) -> str:
            signals = self.stopping.signals
            try:
                with signals.interruptible(after=_STOP_GRACE):
                    return work(rank0)
            except StopNow:
                return f"{STOPPED}{signals.reason}"

        own = self.run_on_controller(phase, interruptible)
        with self.phase(f"{phase}: telling the others"):
            return broadcast_text(own, self.runtime)

    def judged(self, step: int) -> Judged:
        """What follows from the evaluation after `step`, on every rank; nothing where none was due, or is judged."""
        asked = (self.config.checkpoint.best.metric, self.config.run.early_stop.metric)
        if asked == (None, None) or step < 1 or not evaluation_due(self.config, step):
            return Judged()
        return Judged.from_text(
            self.ask_controller(f"judging the evaluation of step {step}", Controller.judged)
        )

    def export_due(self, step: int, *, resumed: bool) -> str:
        """The folder that is due after `step` by `checkpoint.export_every`, the same on every rank; "": none.

        Args: resumed: `step` is the one that the run goes on from, which may have stopped before or after the export.
        """
        name = export_name(self.config, step)
        if not name or not resumed:
            return name
        with self.phase("looking for an export"):  # rank 0 looks at the disk for all
            return self.broadcast_text("" if is_exported(self.config, name) else name)

    def run_or_stop(
        self, phase: str, step: int, work: Callable[[Controller], WorkResult], sync: Callable[[], None]
    ) -> None:
        """Rank 0's work with the engine; `sync` runs on every rank in between when servers came back without weights.

        Args:
            step: the last one that is complete.

        Raises:
            CannotGoOn: on every rank, with that reason. StopRequested: somebody asked to stop meanwhile.
        """
        while reason := self.ask_controller(phase, work):
            if reason.startswith(STOPPED):
                raise StopRequested(step, reason.removeprefix(STOPPED))
            if reason != NEEDS_WEIGHTS:
                raise CannotGoOn(step, reason)
            sync()

    def is_saved(self, step: int) -> bool:
        """Whether nothing was trained since a checkpoint, as rank 0 knows; the same on every rank."""
        with self.phase("asking what is saved"):
            return bool(self.broadcast_text("yes" if self.stopping.is_saved(step) else ""))

    def broadcast_text(self, text: str | None) -> str:
        """Rank 0's `text` on every rank; `text` is ignored elsewhere, and None means "". Call inside a phase."""
        return broadcast_text(text or "" if self.runtime.is_main else None, self.runtime)

    def share_batch(self) -> FlatBatch:
        """The batch that the controller collected last, flat, on every rank."""
        arrays = None if self.controller is None else flatten(self.controller.batch).to_arrays()
        if self.controller is not None:
            self.stopping.will_finish(self.controller.batch.step)
        with self.phase("sharing the batch"):
            return FlatBatch.from_arrays(broadcast_arrays(arrays, self.runtime))

    @property
    def _patience(self) -> float:
        """Seconds for rank 0's longest work: a rollout, and before it the wait for servers."""
        rollout = self.config.rollout
        return rollout.deadline + (rollout.servers_deadline if uses_servers(self.config) else 0.0)


def require_rank_zero(value: T | None) -> T:
    """`value`, which rank 0 has and the others do not."""
    if value is None:
        raise AssertionError("used on a rank other than 0")
    return value
