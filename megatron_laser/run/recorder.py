"""What a run writes down: metrics, live view, dumps of rollouts, report, and whether it has stopped or finished.

Only metrics.jsonl can end a run: its line is what a step has shown. The line that could not be written goes into the
checkpoint that the run saves before it stops, and into the file at the next start. The rest is for people to look at:
it is switched off when it fails.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.config.modes import batches_folder, mode_words, trains
from megatron_laser.observability.best_effort import BestEffort
from megatron_laser.observability.live_view import LiveView
from megatron_laser.observability.metrics_logger import MetricsLogger
from megatron_laser.observability.rollout_dump import dump_rollouts
from megatron_laser.observability.wandb_sink import open_wandb
from megatron_laser.report.run_report import write_report
from megatron_laser.run.output_folder import FINISHED, STOPPED, ClaimedFolder
from megatron_laser.run.recorded_batches import write_batch
from megatron_laser.types import RolloutBatch

logger = logging.getLogger(__name__)

_UNWRITTEN = "unwritten_metrics"


class RunRecorder:
    """The files of a run, open on rank 0."""

    def __init__(self, config: RunConfig, claimed: ClaimedFolder, resumed: Mapping[str, Any] | None) -> None:
        """Open them.

        Args:
            resumed: the checkpoint's state; None for a fresh start, which drops what an earlier attempt wrote.

        Raises:
            ConfigError: metrics.jsonl cannot be written.
        """
        self._config = config
        self._claimed = claimed
        self._folder = Path(config.run.output_dir)
        self._dumps = BestEffort("logging.rollouts_every")
        self._batches = BestEffort("logging.record_batches_every")
        state = (None if resumed is None else resumed["run"]) or {}
        with ExitStack() as opened:
            wandb = None
            if config.logging.wandb:
                wandb = open_wandb(
                    self._folder,
                    project=config.logging.wandb_project,
                    name=config.run.name,
                    settings=config.model_dump(mode="json"),
                )
                if wandb is not None:
                    opened.callback(wandb.close)
            try:
                self._metrics = MetricsLogger(
                    self._folder,
                    tensorboard=config.logging.tensorboard,
                    last_step=-1 if resumed is None else int(resumed["step"]),
                    unwritten=state.get(_UNWRITTEN, ()),
                    wandb=wandb,
                )
            except OSError as error:
                raise ConfigError([f"run.output_dir {self._folder} cannot be written: {error}"]) from error
            opened.pop_all()
        self._view = LiveView(config.run.steps, mode=config.logging.live, title=config.run.name)
        self._view.__enter__()

    def write(self, step: int, metrics: dict[str, Any]) -> str:
        """Log and show a step's metrics.

        Returns:
            "", or why the run has to save and stop: metrics.jsonl cannot be written, or the folder is gone.

        Raises:
            ConfigError: the folder is gone, and its place is taken or cannot be written.
        """
        self._view.update(step, metrics)
        trouble = ""
        try:
            self._metrics.log(step, metrics)
        except OSError as error:
            trouble = f"metrics.jsonl cannot be written ({error})"
        if not self._claimed.intact():
            trouble = (
                f"run.output_dir {self._folder} was deleted, moved or replaced while the run wrote into it"
            )
            self._claimed.restore(self._config)
        return trouble

    def histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        """Named distributions, to TensorBoard."""
        self._metrics.histograms(step, values)

    def dump(self, batch: RolloutBatch, scores: Any, advantages: Any) -> None:
        """Write the step's rollouts for people, if it is due; see `dump_rollouts`."""
        every = self._config.logging.rollouts_every
        if every and batch.step % every == 0:
            path = self._folder / "rollouts" / f"step_{batch.step}.jsonl"
            self._dumps(lambda: dump_rollouts(path, batch, scores, advantages))

    def keep(
        self, batch: RolloutBatch, progress: Mapping[str, float], origin: Callable[[], Mapping[str, Any]]
    ) -> str:
        """Keep the batch for `run.mode: train_only`, if it is due; see `write_batch`.

        Returns:
            "", or why the run has to save and stop: it is there to keep batches, and this one cannot be written.
        """
        every = self._config.logging.record_batches_every
        if not every or batch.step % every:
            return ""
        folder = batches_folder(self._config)
        if trains(self._config):
            self._batches(lambda: write_batch(folder, batch, progress, origin()))
            return ""
        try:
            write_batch(folder, batch, progress, origin())
        except OSError as error:
            return f"the batch of step {batch.step} cannot be written to {folder} ({error}); it is lost"
        return ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: whose it is, and lines that metrics.jsonl lacks."""
        owner, lines = self._claimed.owner, self._metrics.unwritten
        named = {} if owner is None else {"owner": asdict(owner)}
        return named | ({_UNWRITTEN: list(lines)} if lines else {})

    def message(self, text: str) -> None:
        """Print a line above the live view."""
        self._view.message(text)

    def record_stop(self, step: int, reason: str) -> None:
        """Say that the run stopped early and can be continued."""
        note = {"step": step, "reason": reason}
        try:
            (self._folder / STOPPED).write_text(json.dumps(note) + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._folder / STOPPED, error)
        self.message(f"stopped after step {step} ({reason}); saved: the same command continues from here")

    def finish(self, step: int, *, complete: bool) -> str:
        """Write the report; `complete`: nothing is left to do, and the same command will say so and not start again.

        Returns:
            "", or why the run is not marked as finished.
        """
        self._view.__exit__(None, None, None)
        if words := mode_words(self._config):
            self.message(f"this was no ordinary run: {words}")
        # `megatron-laser report` writes it again.
        BestEffort("writing report.md", Exception)(lambda: write_report([self._folder]))
        try:
            if complete:
                self._claimed.mark_finished(step)
        except OSError as error:
            return f"{self._folder / FINISHED} cannot be written: {error}"
        return ""

    def close(self) -> None:
        """Close all of them; may be called again."""
        self._view.__exit__(None, None, None)
        self._metrics.close()
