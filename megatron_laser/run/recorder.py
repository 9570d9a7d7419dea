"""What a run writes down: metrics, live view, dumps of rollouts, report, and whether it has stopped or finished.

Only metrics.jsonl can end a run: its line is what a step has shown. The line that could not be written goes into the
checkpoint that the run saves before it stops, and into the file at the next start. The rest is for people to look at:
it is switched off when it fails.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.config.modes import batches_folder, mode_words, trains
from megatron_laser.observability.alarms import AlarmWatch
from megatron_laser.observability.best_effort import BestEffort
from megatron_laser.observability.events import EventLog, Kind
from megatron_laser.observability.live_view import LiveView
from megatron_laser.observability.metrics_logger import MetricsLogger, read_metrics
from megatron_laser.observability.rollout_dump import TokenPart, dump_rollouts
from megatron_laser.observability.wandb_sink import open_wandb
from megatron_laser.report.run_report import write_report
from megatron_laser.report.what_happened import read_events, what_happened
from megatron_laser.run.banner import StartFacts, banner_lines
from megatron_laser.run.export import export_best
from megatron_laser.run.last_words import last_words
from megatron_laser.run.life_log import LifeLog
from megatron_laser.run.output_folder import FINISHED, ClaimedFolder
from megatron_laser.run.recorded_batches import write_batch
from megatron_laser.run.stopping import shell_command, write_stopped
from megatron_laser.trainer.checkpoint.folder import checkpoint_root, published
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
        self._started = time.monotonic()
        self._first_step = 1 if resumed is None else int(resumed["step"]) + 1
        self._last_words_due = True
        self._folder = Path(config.run.output_dir)
        self._dumps = BestEffort("logging.rollouts_every", Exception)
        self._batches = BestEffort("logging.record_batches_every", Exception)
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
                    all_metrics=config.logging.all_metrics,
                )
            except OSError as error:
                raise ConfigError([f"run.output_dir {self._folder} cannot be written: {error}"]) from error
            opened.pop_all()
        self.events = EventLog(self._folder, last_step=-1 if resumed is None else int(resumed["step"]))
        if resumed is not None:
            self.events.add("resume", f"goes on from the checkpoint of step {int(resumed['step'])}")
        for text in claimed.told:
            self.events.add("resume", text)
        for change in claimed.changes:
            self.events.add("change", change.text, change.step)
        self._view = LiveView(config.run.steps, mode=config.logging.live, title=config.run.name)
        self._view.__enter__()
        self.events.show = self._view.message
        self._life = LifeLog(self.events, self._view.message if self._view.is_live else None)
        self._life.__enter__()
        self._judge = BestEffort("alarms", Exception)
        self._watch = AlarmWatch(config.alarms)
        if resumed is not None:
            self._judge(self._watch_earlier_steps)

    def write(self, step: int, metrics: dict[str, Any]) -> str:
        """Log and show a step's metrics.

        Returns:
            "", or why the run has to save and stop: metrics.jsonl cannot be written, or the folder is gone.

        Raises:
            ConfigError: the folder is gone, and its place is taken or cannot be written.
        """
        self._view.update(step, metrics)
        self._judge(lambda: self._tell_alarms(step, metrics))
        self._note(step, metrics)
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

    def _note(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Events that metrics tell of. (A skipped update is logged, with its reason, where it is skipped.)"""
        for prefix, split in (("eval/", "validation"), ("test/", "test")):
            accuracy = metrics.get(f"{prefix}accuracy")
            if accuracy is not None:
                self.events.add("evaluation", f"{split} after step {step}: accuracy {accuracy:.3f}", step)

    def _watch_earlier_steps(self) -> None:
        """What a resumed run has shown before: early levels stay those of its beginning, and nothing is told twice."""
        for row in read_metrics(self._metrics.path):
            self._watch.add(int(row["step"]), row)
        self._view.show_alarms(self._watch.active)

    def _tell_alarms(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A line for each alarm when it is raised and when it is over."""
        raised = self._watch.add(step, metrics)
        for alarm in raised:
            self._view.message(alarm.line)
            self.events.add("alarm", alarm.line, step, alarm=alarm.name, on=True)
        for alarm in self._watch.ended:
            self._view.message(alarm.end_line)
            self.events.add("alarm", alarm.end_line, step, alarm=alarm.name, on=False)
        self._view.show_alarms(self._watch.active)

    def histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        """Named distributions, to TensorBoard."""
        self._metrics.histograms(step, values)

    def dump(
        self,
        batch: RolloutBatch,
        scores: Any,
        advantages: Any,
        tokens: Callable[[], TokenPart] | None = None,
    ) -> None:
        """Write the step's rollouts for people, if it is due; see `dump_rollouts`.

        `tokens`: called where the dump has them (`logging.rollouts_tokens`).
        """
        every = self._config.logging.rollouts_every
        if every and batch.step % every == 0:
            path = self._folder / "rollouts" / f"step_{batch.step}.jsonl"
            with_tokens = tokens if self._config.logging.rollouts_tokens else None
            self._dumps(
                lambda: dump_rollouts(
                    path, batch, scores, advantages, None if with_tokens is None else with_tokens()
                )
            )

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

    def say(self, kind: Kind, text: str, step: int | None = None) -> None:
        """An event of the run, and its line above the live view; `step`: by default the one that is being done."""
        self.events.say(kind, text, step)

    def announce(self, facts: StartFacts) -> None:
        """The banner, and the same facts as an event."""
        self._view.message("\n".join(banner_lines(facts, self._view.width)))
        self.events.add("start", facts.summary, facts=facts.as_json())

    def record_stop(self, step: int, reason: str, *, saved: bool) -> None:
        """Say that the run stopped early and can be continued; `saved`: it was saved for that."""
        self.events.add("stop", f"stopped after step {step}: {reason}", step)
        write_stopped(self._folder, step, reason)
        done = "saved" if saved else "saved already" if step else "nothing was trained yet"
        self.message(
            f"stopped after step {step} ({reason}); {done}: the same command continues from here\n"
            f"  {shell_command()}"
        )
        self._say_last_words(f"stopped ({reason})")

    def export_best(self) -> None:
        """Write hf_best, where a best checkpoint is kept."""
        export_best(self._config)

    def finish(self, step: int, *, early: str, complete: bool) -> str:
        """Write the report; `complete`: nothing is left to do, and the same command will say so and not start again.

        Args: early: why the run ends before `run.steps`, "" where it does not.

        Returns:
            "", or why the run is not marked as finished.
        """
        self._view.__exit__(None, None, None)
        if words := mode_words(self._config):
            self.message(f"this was no ordinary run: {words}")
        if early:
            self.events.add("finished", f"finished early after step {step}: {early}", step)
            self.message(f"finished early after step {step} of {self._config.run.steps}: {early}")
        # `megatron-laser report` writes it again.
        BestEffort("writing report.md", Exception)(lambda: write_report([self._folder]))
        try:
            if complete:
                self._claimed.mark_finished(step, self._config if early else None)
        except OSError as error:
            return f"{self._folder / FINISHED} cannot be written: {error}"
        how = f"finished early ({early})" if early else "finished"
        self._say_last_words(how if complete else "not finished, although all steps are done", "end")
        return ""

    def _say_last_words(self, how: str, kind: Kind | None = None) -> None:
        """The last lines, once; with a `kind` also as an event."""
        if not self._last_words_due:
            return
        self._last_words_due = False

        def say() -> None:
            self._view.__exit__(None, None, None)
            rows, events = read_metrics(self._metrics.path), read_events(self._folder)
            happened = what_happened(rows, events, self._config.alarms)
            if kind is not None:
                self.events.add(kind, f"{how} after step {happened.steps}", happened.steps)
            root = checkpoint_root(self._config)
            found = published(root)
            lines = last_words(
                how,
                happened,
                self._folder,
                seconds=time.monotonic() - self._started,
                first_step=self._first_step,
                steps=self._config.run.steps,
                checkpoints=root,
                newest=found[-1][0] if found else None,
                width=self._view.width,
            )
            self.message("\n".join(lines))

        BestEffort("the last lines of the run", Exception)(say)

    def close(self) -> None:
        """Close all of them; may be called again. Before `finish` or `record_stop` the run has failed, and says so."""
        error = sys.exc_info()[1]
        how = "failed" if error is None or isinstance(error, Exception) else "stopped"  # by Ctrl-C
        self._say_last_words(f"{how} ({_in_short(error)})" if error is not None else how, "end")
        self._view.__exit__(None, None, None)
        self._life.__exit__()
        self.events.close()
        self._metrics.close()


def _in_short(error: BaseException) -> str:
    """The first line of an error: all of it is printed at the end."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text:.160}" if text else type(error).__name__
