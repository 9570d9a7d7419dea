"""The training loop: the whole system on one page.

Every rank runs `train`. Rank 0 also has a `Controller`: prompts, engine, graders, metrics. One step is

    rollout   rank 0 generates and grades; the others wait on the store
    share     the finished batch goes to every rank as flat arrays
    train     old-policy pass, scores, advantages, optimizer steps: Megatron's schedules on all ranks
    sync      the new weights go to the engine as one stream of Hugging Face tensors
    report    metrics, dumps, evaluation
    save      when due: weights, optimizer, cursor; published by one rename

so generation for step n + 1 uses the weights of step n (strictly on-policy), or, with `rollout.ahead: 1`, those of
step n - 1, and then overlaps with the training of step n. `colocation`: who has the memory of GPUs that both share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.coordinator import Coordinator
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.distributed.transport import broadcast_arrays
from megatron_laser.model import platform
from megatron_laser.model.platform import trim_host_memory
from megatron_laser.observability.timers import Timers
from megatron_laser.run.colocation import Colocation, Phase, open_colocation
from megatron_laser.run.controller import Controller, evaluation_due
from megatron_laser.run.engines import needs_first_sync
from megatron_laser.run.export import export_hf
from megatron_laser.run.inputs import read_inputs
from megatron_laser.run.ranks import CannotGoOn, Ranks, RunEnded, on_rank_zero
from megatron_laser.run.session import session, stop_signals
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.stragglers import Stragglers, time_reductions
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.weight_sync import sync_weights

_SYNC_ATTEMPTS = 3


def train(config: RunConfig, *, overwrite: bool = False) -> Path:
    """Run `config` from its first step to its last; returns the output folder. Call on every rank."""
    timers = Timers()
    with session(config, timers) as (runtime, coordinator):
        _train(config, runtime, coordinator, timers, overwrite)
    return Path(config.run.output_dir)


def _train(config: RunConfig, runtime: Runtime, coordinator: Coordinator, timers: Timers, anew: bool) -> None:
    inputs = coordinator.run_on_rank_zero(  # finds everything that can be wrong with the user's files
        "reading inputs", lambda: read_inputs(config, overwrite=anew), deadline=config.run.deadline
    )
    with coordinator.phase("sharing the inputs"):
        shared = broadcast_arrays(None if inputs is None else inputs.shared_arrays(), runtime)
    controller: Controller | None = None
    try:
        if shared["finished"]:
            return
        token = int(shared["score_token_id"])
        with coordinator.phase("building the model and loading the checkpoint"):
            trainer = Trainer(config, runtime, score_token_id=token if token >= 0 else None, timers=timers)
            time_reductions(trainer.policy, timers)
            checkpoints = CheckpointManager(config, runtime, trainer.policy)
            resumed = checkpoints.resume() if config.run.resume == "auto" else None
            colocation = open_colocation(config, runtime, trainer, timers)
        controller = coordinator.run_on_rank_zero(
            "starting the rollout engine",
            lambda: Controller(config, on_rank_zero(inputs), timers, resumed=resumed),
            deadline=config.run.deadline + 2 * config.rollout.sglang.start_deadline,
        )
        stragglers = Stragglers(runtime, config.logging.straggler_every)
        ranks = Ranks(config, runtime, coordinator, controller)
        run = _Run(config, ranks, trainer, checkpoints, timers, stragglers, colocation)
        with stop_signals(ranks.request_stop):
            run.run(first_step=1 if resumed is None else resumed["step"] + 1, resumed=resumed is not None)
    finally:
        if controller is not None:
            controller.close()
        elif inputs is not None:
            inputs.folder.release()


@dataclass(frozen=True)
class _Run:
    """One run on one rank."""

    config: RunConfig
    ranks: Ranks
    trainer: Trainer
    checkpoints: CheckpointManager
    timers: Timers
    stragglers: Stragglers
    colocation: Colocation

    def run(self, first_step: int, *, resumed: bool) -> None:
        """All steps from `first_step`, or as many as until somebody asks to stop or the servers are lost."""
        try:
            if resumed or needs_first_sync(self.config):  # resumed at step 0: from a converted checkpoint
                self._sync(first_step - 1)
            for step in range(first_step - 1, self.config.run.steps + 1):
                if step < first_step:
                    self._led("first evaluation", step, lambda controller: controller.evaluate_first())
                else:
                    self.step(step)
                if (reason := self.ranks.coordinator.agree_to_stop(step)) is not None:
                    self.stop(step, reason)
                    return
                if step >= first_step and self.checkpoints.due(step):
                    self._save(step)
        except CannotGoOn as error:
            self.stop(error.step, error.reason)
            raise RunEnded(f"saved after step {error.step} and stopped: {error.reason}") from None
        self.finish()

    def step(self, step: int) -> None:
        """One rollout batch: generate, grade, train, sync, record."""
        platform.reset_peak_memory()
        trim_host_memory(step)
        lost: CannotGoOn | None = None
        with self.timers("total"):
            self._led(f"rollout of step {step}", step - 1, lambda controller: controller.collect(step))
            flat = self.ranks.share(lambda controller: controller.batch)
            if self.ranks.controller is not None:
                self.ranks.controller.collect_ahead(step + 1)
            self.colocation.enter(Phase.TRAIN, self.ranks)
            with self.ranks.coordinator.phase(f"train step {step}"):
                result = self.trainer.train_step(flat, step)
            try:
                if self.config.rollout.ahead:
                    self._led(
                        f"rollout ahead of step {step + 1}",
                        step,
                        lambda controller: controller.finish_ahead(),
                    )
                self._sync(step)
            except CannotGoOn as error:
                lost = error  # the step itself is complete: it is recorded before the run stops
        times = self.timers.collect()
        self.stragglers.add(step, times)
        if lost is None and evaluation_due(self.config, step):
            try:
                self._led(f"evaluation after step {step}", step, lambda controller: controller.evaluate(step))
            except CannotGoOn as error:
                lost = error
        self._led(f"recording step {step}", step, lambda controller: controller.record(step, result, times))
        if lost is not None:
            raise lost

    def stop(self, step: int, reason: str) -> None:
        """Save and leave, so that the same command continues after `step`."""
        self._save(step)
        if not self._saved():
            raise CheckpointError(f"stopping after step {step} ({reason}): {self.checkpoints.trouble}")
        self.ranks.run_on_controller("stopping", lambda controller: controller.stopped(step, reason))

    def finish(self) -> None:
        """Export the trained model, evaluate it on the test split, write the report."""
        saved, steps, trouble = self._saved(), self.config.run.steps, ""
        if self.config.checkpoint.export_hf:
            with self.colocation.during(Phase.SYNC, self.ranks), self.ranks.coordinator.phase("export"):
                own = export_hf(self.config, self.trainer.weight_stream(), is_main=self.ranks.runtime.is_main)
                trouble = self.ranks.broadcast_text(own)
        try:
            self._led(
                "final evaluation",
                steps,
                lambda controller: controller.finish(complete=saved and not trouble),
            )
        except CannotGoOn as error:
            trouble = trouble or error.reason
        if not saved:
            raise CheckpointError(f"all steps are done, but the last save failed: {self.checkpoints.trouble}")
        if trouble:
            raise RunEnded(f"all {steps} steps are done: {trouble}; the same command goes on here")

    def _led(self, phase: str, step: int, work: Callable[[Controller], str]) -> None:
        """Rank 0 works with the engine, which holds the weights of `step` or is given them in between."""
        self.ranks.run_with_engine(phase, step, work, lambda: self._sync(step))

    def _sync(self, version: int) -> None:
        """Give the engine the trained weights; again, to the servers that are left, when one dies on the way."""
        trouble = ""
        for _ in range(_SYNC_ATTEMPTS):
            if needs_first_sync(self.config):
                self._led("waiting for servers", version, lambda controller: controller.await_servers())
            self.colocation.enter(Phase.SYNC, self.ranks)
            with self.timers("sync"), self.ranks.coordinator.phase(f"weight sync of step {version}"):
                engine = None if self.ranks.controller is None else self.ranks.controller.engine
                trouble = self.ranks.broadcast_text(
                    sync_weights(self.trainer.weight_stream(), engine, version=version)
                )
            if not (trouble := trouble or self.colocation.enter(Phase.GENERATE, self.ranks)):
                return
        raise CannotGoOn(version, f"{_SYNC_ATTEMPTS} weight syncs in a row failed: {trouble}")

    def _save(self, step: int) -> None:
        controller, saving = self.ranks.controller, self.ranks.coordinator.phase(f"saving step {step}")
        with self.timers("checkpoint"), saving, self.colocation.during(Phase.SAVE, self.ranks):
            self.checkpoints.save(step, None if controller is None else controller.state())

    def _saved(self) -> bool:
        """Whether the newest checkpoint is on the disk; waits for it."""
        with self.ranks.coordinator.phase("waiting for the last save"):
            return self.checkpoints.wait()
