"""Everything that the training loop needs on this rank, put together in the order in which it can fail cheapest.

The user's files first (rank 0), then model, checkpoint and memory (all ranks), then the rollout engine with its servers
(rank 0). It is taken apart in the opposite order, whatever ends the run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_laser.config.modes import generates, mode_words, trains
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.broadcast import broadcast_arrays
from megatron_laser.distributed.coordinator import Coordinator
from megatron_laser.observability.control import Watcher
from megatron_laser.observability.timers import Timers
from megatron_laser.run.changes import may_change
from megatron_laser.run.colocation import Colocation, open_colocation
from megatron_laser.run.controller import Controller
from megatron_laser.run.engines import uses_servers
from megatron_laser.run.inputs import read_inputs, settled, shared_held
from megatron_laser.run.offline_controller import OfflineController
from megatron_laser.run.profiling import Windows
from megatron_laser.run.ranks import Ranks, require_rank_zero
from megatron_laser.run.session import session, stack_signal, window_signal
from megatron_laser.run.stop_signals import StopSignals
from megatron_laser.run.stopping import Stopping
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.frozen import FrozenTrainer
from megatron_laser.trainer.score_drift import ScoreDrift
from megatron_laser.trainer.stragglers import Stragglers, time_reductions
from megatron_laser.trainer.timeline import Timeline
from megatron_laser.trainer.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One rank's parts of a run.

    Attributes:
        ranks: this rank's view of the others; on rank 0 with the controller.
        first_step: the step after the checkpoint's; 1 for a fresh run.
        needs_sync: the engine holds other weights than the trainer: servers hold those that they were started with,
            and a resumed run has trained since (at step 0: it starts from a converted checkpoint).
        keeps_syncing: it needs the trained ones after each step: something is trained, and somebody generates.
    """

    config: RunConfig
    ranks: Ranks
    trainer: Trainer
    drift: ScoreDrift
    checkpoints: CheckpointManager
    colocation: Colocation
    timers: Timers
    stragglers: Stragglers
    timeline: Timeline
    windows: Windows
    first_step: int
    needs_sync: bool
    keeps_syncing: bool = True


@contextmanager
def open_run(config: RunConfig, *, signals: StopSignals, overwrite: bool) -> Iterator[Run | None]:
    """Open the run of `config` on this rank; call on every rank. None: it has done all its steps before.

    SIGUSR2 inside asks it to profile the next steps, SIGQUIT for the stacks of this rank. An error inside is told to
    the other ranks.

    Args:
        signals: which ask it to stop, at once as long as it starts (`StopNow`).
        overwrite: move a run that is in `run.output_dir` aside and start anew.

    Raises:
        UserError: with the setting, or the file and line, that is wrong.
    """
    timers = Timers()
    stopping = Stopping(config, signals)
    with (
        stack_signal(),
        session(config, timers, stopping) as (runtime, coordinator),
        _window_signal(config, coordinator),
    ):
        if words := mode_words(config):
            logger.warning("%s", words)  # shown by rank 0 alone
        change = may_change()
        inputs = coordinator.run_on_rank_zero(
            "reading inputs",
            lambda: read_inputs(config, overwrite=overwrite, change=change),
            deadline=config.run.deadline,
        )
        with coordinator.phase("sharing the inputs"):
            shared = broadcast_arrays(None if inputs is None else inputs.shared_arrays(), runtime)
        config = settled(config, shared)
        stopping.settled(config.run.steps)
        controller: Controller | None = None
        windows = Windows(
            config.logging.profile,
            Path(config.run.output_dir),
            timers,
            rank=runtime.rank,
            steps=config.run.steps,
            asked=coordinator.take_window,
        )
        watcher: Watcher | None = None
        try:
            if shared["finished"]:
                yield None
                return
            if inputs is not None:
                stopping.open(inputs.folder, runtime.world_size)
            watcher = Watcher(
                Path(config.run.output_dir),
                runtime.rank,
                runtime.world_size,
                phase=lambda: _doing(coordinator, timers),
                on_profile=coordinator.request_window if runtime.is_main else None,
            )
            found = int(shared["score_token_id"])
            token = found if found >= 0 else None
            with coordinator.phase("building the model and loading the checkpoint"):
                trainer_kind = Trainer if trains(config) else FrozenTrainer
                trainer = trainer_kind(config, runtime, score_token_id=token, timers=timers)
                time_reductions(trainer.policy, timers)
                checkpoints = CheckpointManager(config, runtime, trainer.policy)
                resumed = checkpoints.resume() if config.run.resume != "never" else None
                stopping.resumed(None if resumed is None else int(resumed["step"]))
                checkpoints.on_published = stopping.published
                colocation = open_colocation(config, runtime, trainer, timers)
            first_step = 1 if resumed is None else resumed["step"] + 1
            drift = ScoreDrift(
                config,
                runtime,
                trainer,
                timers,
                score_token_id=token,
                held=shared_held(shared),
                first_step=first_step,
            )
            kind = Controller if generates(config) else OfflineController
            controller = coordinator.run_on_rank_zero(
                "starting the rollout engine",
                lambda: kind(config, require_rank_zero(inputs), timers, resumed=resumed),
                deadline=config.run.deadline + 2 * config.rollout.sglang.start_deadline,
            )
            if controller is not None:
                controller.announce(runtime.world_size, checkpoints)
            ranks = Ranks(config, runtime, coordinator, controller, stopping)
            run = Run(
                config,
                ranks,
                trainer,
                drift,
                checkpoints,
                colocation,
                timers,
                Stragglers(runtime, config.logging.straggler_every),
                Timeline(
                    runtime,
                    timers,
                    Path(config.run.output_dir),
                    every=config.logging.timeline_every,
                    last_step=first_step - 1,
                    servers=list if controller is None else controller.servers_busy,
                ),
                windows,
                first_step=first_step,
                needs_sync=generates(config)
                and (resumed is not None or uses_servers(config) or config.run.fake.weights),
                keeps_syncing=trains(config) and generates(config),
            )
            stopping.running(coordinator.agree_to_start)
            signals.on_request(ranks.request_stop)
            if controller is not None:
                signals.say = partial(controller.recorder.say, "signal")
            yield run
            windows.close()
        except BaseException as error:
            stopping.ended(error)
            raise
        finally:
            stopping.leave()
            windows.abandon()
            if watcher is not None:
                watcher.close()
            if controller is not None:
                controller.close()
            elif inputs is not None:
                inputs.folder.release()


def _window_signal(config: RunConfig, coordinator: Coordinator) -> AbstractContextManager[None]:
    return window_signal(partial(coordinator.request_window, config.logging.profile.asked_steps))


def _doing(coordinator: Coordinator, timers: Timers) -> str:
    """What this rank does, in words, for whoever asks."""
    phases = (coordinator.doing, timers.current.replace("total", ""))
    return ": ".join(filter(None, phases)) or "between two phases"
