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
from megatron_laser.leader import Leader, RunInputs, read_inputs
from megatron_laser.model import platform
from megatron_laser.model.dtypes import DTYPES
from megatron_laser.model.hf_folder import write_hf_folder
from megatron_laser.observability.timers import Timers
from megatron_laser.trainer import runtime as runtimes
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.coordinator import Coordinator
from megatron_laser.trainer.runtime import Runtime
from megatron_laser.trainer.signals import stop_signals
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.trainer.transport import broadcast_arrays
from megatron_laser.types import RolloutBatch
from megatron_laser.weight_sync import sync_weights

T = TypeVar("T")


def train(config: RunConfig) -> Path:
    """Run `config` from its first step to its last; returns the output folder. Call on every rank."""
    runtime = runtimes.start(config)
    coordinator = Coordinator(runtime.store, runtime.rank, runtime.world_size, deadline=config.run.deadline)
    leader: Leader | None = None
    try:
        # Everything that can be wrong with the user's files is found before a model is built.
        inputs = coordinator.lead("reading inputs", lambda: read_inputs(config), deadline=config.run.deadline)
        score_token_id = _share_score_token(inputs, runtime)
        timers = Timers()
        trainer = Trainer(config, runtime, score_token_id=score_token_id, timers=timers)
        checkpoints = CheckpointManager(config, runtime, trainer.policy)
        resumed = checkpoints.resume() if config.run.resume == "auto" else None
        leader = coordinator.lead(
            "starting the rollout engine",
            lambda: Leader(config, only_on_main(inputs), timers, resumed=resumed),
            deadline=config.run.deadline,
        )
        run = _Run(config, runtime, coordinator, trainer, checkpoints, leader, timers)
        with stop_signals(coordinator.request_stop):
            run.run(first_step=1 if resumed is None else resumed["step"] + 1)
        return Path(config.run.output_dir)
    finally:
        if leader is not None:
            leader.close()
        coordinator.close()
        runtimes.stop()


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

    def run(self, first_step: int) -> None:
        """All steps from `first_step`, or as many as until somebody asks to stop."""
        if first_step == 1:
            self._lead("evaluation before the first step", lambda leader: leader.evaluate_baseline())
        else:
            self._sync(first_step - 1)
        for step in range(first_step, self.config.run.steps + 1):
            self.step(step)
            reason = self.coordinator.agree_to_stop(step)
            if reason is not None:
                self.stop(step, reason)
                return
            if self.checkpoints.due(step, self.config.run.steps):
                self._save(step)
        self.checkpoints.wait()
        self.finish()

    def step(self, step: int) -> None:
        """One rollout batch: generate, grade, train, sync, record."""
        platform.reset_peak_memory()
        with self.timers("total"):
            batch = self._lead(f"rollout of step {step}", lambda leader: leader.collect(step))
            flat = self._share(batch)
            result = self.trainer.train_step(flat, step)
            self._sync(step)
        self._lead(f"recording step {step}", lambda leader: leader.record(step, only_on_main(batch), result))

    def stop(self, step: int, reason: str) -> None:
        """Save and leave, so that the same command continues after `step`."""
        if not (self._save(step) and self.checkpoints.wait()):
            raise RuntimeError(f"stopping after step {step} ({reason}): the checkpoint was not saved")
        self._lead("stopping", lambda leader: leader.stopped(step, reason))

    def finish(self) -> None:
        """Export the trained model, evaluate it on the test split, write the report."""
        if self.config.checkpoint.export_hf:
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
        self._lead("final evaluation and report", lambda leader: leader.finish())

    def _save(self, step: int) -> bool:
        with self.timers("checkpoint"):
            return self.checkpoints.save(step, None if self.leader is None else self.leader.state())

    def _sync(self, version: int) -> None:
        """Give the engine the trained weights."""
        with self.timers("sync"):
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


def _share_score_token(inputs: RunInputs | None, runtime: Runtime) -> int | None:
    """The id of z_c on every rank; only rank 0 reads the tokenizer."""
    arrays = broadcast_arrays(None if inputs is None else inputs.shared_arrays(), runtime)
    score_token_id = int(arrays["score_token_id"])
    return score_token_id if score_token_id >= 0 else None


def only_on_main(value: T | None) -> T:
    """What rank 0 has and the others do not."""
    if value is None:
        raise AssertionError("used on a rank other than 0")
    return value
