"""The training loop: the whole system on one page.

Every rank runs `train`. Rank 0 also has a `Leader`: prompts, engine, graders, metrics. One step is

    rollout   rank 0 generates and grades; the others wait on the store
    share     the finished batch goes to every rank as flat arrays
    train     old-policy pass, scores, advantages, optimizer steps: Megatron's schedules on all ranks
    sync      the new weights go to the engine as one stream of Hugging Face tensors
    report    metrics, dumps, evaluation
    save      when due: weights, optimizer, cursor; published by one rename

so generation for step n + 1 always uses the weights of step n (strictly on-policy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.config.schema import RunConfig
from megatron_laser.inputs import read_inputs
from megatron_laser.leader import Leader
from megatron_laser.model import platform
from megatron_laser.model.dtypes import DTYPES
from megatron_laser.model.hf_folder import write_hf_folder
from megatron_laser.observability.host_memory import trim_host_memory
from megatron_laser.observability.timers import Timers
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.coordinator import Coordinator
from megatron_laser.trainer.runtime import Runtime
from megatron_laser.trainer.session import session
from megatron_laser.trainer.signals import stop_signals
from megatron_laser.trainer.stragglers import Stragglers, time_reductions
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.trainer.transport import broadcast_arrays
from megatron_laser.types import RolloutBatch
from megatron_laser.weight_sync import sync_weights

T = TypeVar("T")


def train(config: RunConfig) -> Path:
    """Run `config` from its first step to its last; returns the output folder. Call on every rank."""
    timers = Timers()
    with session(config, timers) as (runtime, coordinator):
        _train(config, runtime, coordinator, timers)
    return Path(config.run.output_dir)


def _train(config: RunConfig, runtime: Runtime, coordinator: Coordinator, timers: Timers) -> None:
    # Everything that can be wrong with the user's files is found before a model is built.
    inputs = coordinator.lead("reading inputs", lambda: read_inputs(config), deadline=config.run.deadline)
    shared = broadcast_arrays(None if inputs is None else inputs.shared_arrays(), runtime)
    leader: Leader | None = None
    try:
        if shared["finished"]:
            return
        score_token_id = int(shared["score_token_id"])
        with coordinator.phase("building the model and loading the checkpoint"):
            trainer = Trainer(
                config, runtime, score_token_id=score_token_id if score_token_id >= 0 else None, timers=timers
            )
            time_reductions(trainer.policy, timers)
            checkpoints = CheckpointManager(config, runtime, trainer.policy)
            resumed = checkpoints.resume() if config.run.resume == "auto" else None
        leader = coordinator.lead(
            "starting the rollout engine",
            lambda: Leader(config, only_on_main(inputs), timers, resumed=resumed),
            deadline=config.run.deadline,
        )
        stragglers = Stragglers(runtime, config.logging.straggler_every)
        run = _Run(config, runtime, coordinator, trainer, checkpoints, leader, timers, stragglers)
        with stop_signals(coordinator.request_stop):
            run.run(first_step=1 if resumed is None else resumed["step"] + 1, resumed=resumed is not None)
    finally:
        if leader is not None:
            leader.close()
        elif inputs is not None:
            inputs.folder.release()


@dataclass(frozen=True)
class _Run:
    """One run on one rank; `leader` is None on all ranks but 0."""

    config: RunConfig
    runtime: Runtime
    coordinator: Coordinator
    trainer: Trainer
    checkpoints: CheckpointManager
    leader: Leader | None
    timers: Timers
    stragglers: Stragglers

    def run(self, first_step: int, *, resumed: bool) -> None:
        """All steps from `first_step`, or as many as until somebody asks to stop."""
        if resumed:  # also from a converted checkpoint of step 0: its weights may not be those of model.path
            self._sync(first_step - 1)
        if first_step == 1:
            self._lead("evaluation before the first step", lambda leader: leader.evaluate_baseline())
        for step in range(first_step, self.config.run.steps + 1):
            self.step(step)
            reason = self.coordinator.agree_to_stop(step)
            if reason is not None:
                self.stop(step, reason)
                return
            if self.checkpoints.due(step):
                self._save(step)
        self.finish()

    def step(self, step: int) -> None:
        """One rollout batch: generate, grade, train, sync, record."""
        platform.reset_peak_memory()
        trim_host_memory(step)
        with self.timers("total"):
            batch = self._lead(f"rollout of step {step}", lambda leader: leader.collect(step))
            with self.coordinator.phase(f"train step {step}"):
                flat = self._share(batch)
                result = self.trainer.train_step(flat, step)
            self._sync(step)
        times = self.timers.collect()
        self.stragglers.add(step, times)
        self._lead(
            f"recording step {step}", lambda leader: leader.record(step, only_on_main(batch), result, times)
        )

    def stop(self, step: int, reason: str) -> None:
        """Save and leave, so that the same command continues after `step`."""
        self._save(step)
        if not self._saved():
            raise CheckpointError(f"stopping after step {step} ({reason}): {self.checkpoints.trouble}")
        self._lead("stopping", lambda leader: leader.stopped(step, reason))

    def finish(self) -> None:
        """Export the trained model, evaluate it on the test split, write the report."""
        saved = self._saved()
        if self.config.checkpoint.export_hf:
            with self.coordinator.phase("export"):
                self._export()
        self._lead("final evaluation and report", lambda leader: leader.finish(complete=saved))
        if not saved:
            raise CheckpointError(f"all steps are done, but the last save failed: {self.checkpoints.trouble}")

    def _export(self) -> None:
        stream = self.trainer.weight_stream()
        if self.runtime.is_main:
            write_hf_folder(
                stream,
                Path(self.config.run.output_dir) / "hf",
                source=Path(self.config.model.path),
                dtype=DTYPES[self.config.model.dtype],
            )
        else:
            sync_weights(stream, None, version=self.config.run.steps)

    def _save(self, step: int) -> None:
        with self.timers("checkpoint"), self.coordinator.phase(f"saving step {step}"):
            self.checkpoints.save(step, None if self.leader is None else self.leader.state())

    def _saved(self) -> bool:
        """Whether the newest checkpoint is on the disk; waits for it."""
        with self.coordinator.phase("waiting for the last save"):
            return self.checkpoints.wait()

    def _sync(self, version: int) -> None:
        """Give the engine the trained weights."""
        with self.timers("sync"), self.coordinator.phase(f"weight sync of step {version}"):
            engine = None if self.leader is None else self.leader.engine
            sync_weights(self.trainer.weight_stream(), engine, version=version)

    def _lead(self, phase: str, work: Callable[[Leader], T]) -> T | None:
        """Rank 0 works while the others wait on the store."""
        return self.coordinator.lead(
            phase, lambda: work(only_on_main(self.leader)), deadline=self.config.rollout.deadline
        )

    def _share(self, batch: RolloutBatch | None) -> FlatBatch:
        """The same flat batch on every rank."""
        arrays = None if batch is None else flatten(batch).to_arrays()
        return FlatBatch.from_arrays(broadcast_arrays(arrays, self.runtime))


def only_on_main(value: T | None) -> T:
    """What rank 0 has and the others do not."""
    if value is None:
        raise AssertionError("used on a rank other than 0")
    return value
