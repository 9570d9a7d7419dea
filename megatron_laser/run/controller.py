"""What only rank 0 has: prompts, engine, graders, and everything that a run writes down."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megatron_laser.config import (
    RunConfig,
    rollout_tries,
)
from megatron_laser.config.modes import generates, trains
from megatron_laser.data import MixedCursor
from megatron_laser.data.tokenizer import decode_response
from megatron_laser.evaluation.keeping import End
from megatron_laser.evaluation.validation import RunEvaluation, evaluation_due
from megatron_laser.model import platform
from megatron_laser.observability.best_effort import BestEffort
from megatron_laser.observability.rollout_dump import TokenPart
from megatron_laser.observability.rollout_metrics import readout_metrics, rollout_metrics, scores_by_label
from megatron_laser.observability.timers import Timers
from megatron_laser.rollout.ahead import RolloutAhead
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.collector import RolloutCollector
from megatron_laser.rollout.endings import watch_endings
from megatron_laser.rollout.engine import StopEarly, StoppedEarly
from megatron_laser.run.announcement import gather_facts
from megatron_laser.run.batch_origin import origin_of
from megatron_laser.run.engines import (
    STOPPED,
    WorkResult,
    await_servers,
    call_engine,
    open_engine,
    open_function,
    routing_shape,
)
from megatron_laser.run.graders import open_graders, open_pool
from megatron_laser.run.inputs import RunInputs, open_cursor
from megatron_laser.run.recorder import RunRecorder
from megatron_laser.run.speed import Speed
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.run_readouts import readings_by_sample
from megatron_laser.trainer.trainer import StepResult
from megatron_laser.types import RolloutBatch, SamplingParams

logger = logging.getLogger(__name__)

_AHEAD_SLACK = 30.0  # seconds
_HISTOGRAM_STEPS = 10  # a histogram costs more than a scalar


class Controller:
    """Rank 0's side of the loop: collect a rollout, record a step, evaluate, finish."""

    def __init__(
        self, config: RunConfig, inputs: RunInputs, timers: Timers, *, resumed: dict[str, Any] | None = None
    ) -> None:
        """Start engine and graders; `resumed` is the checkpoint's state, whose cursor and step are taken over."""
        self._config = config
        self._inputs = inputs
        self._timers = timers
        self._folder = Path(config.run.output_dir)
        self._batch: RolloutBatch | None = None
        self._evaluation: RunEvaluation | None = None
        self._evaluated: dict[str, float] = {}
        self._resumed = resumed
        self._edited: list[str] = []
        self._collecting = StopEarly()
        self._stop_reason = ""
        self._closing = ExitStack()
        try:
            self._open(resumed)
        except BaseException:
            self.close()
            raise

    def _open(self, resumed: dict[str, Any] | None) -> None:
        config, inputs = self._config, self._inputs
        self._closing.callback(inputs.folder.release)
        self._cursor = open_cursor(config, inputs)
        self.engine = open_engine(config)
        self._close_later("rollout engine", self.engine.close)
        self._speed = Speed(config, self.engine)
        self._grading = open_pool(config.reward)
        self._close_later("grading workers", self._grading.close)
        self._function = open_function(config, inputs.tokenizer, inputs.score_token_id, self.engine)
        if self._function is not None:
            self._close_later("rollout function", self._function.close)
        self._graders = open_graders(config, inputs, self._close_later)
        rollout = config.rollout
        engine_scores = config.laser.enabled and config.laser.score_source == "server"
        self._collector = RolloutCollector(
            self.engine,
            self._grading,
            inputs.train,
            self._cursor,
            sampling=SamplingParams(
                samples_per_prompt=rollout.samples_per_prompt,
                max_new_tokens=rollout.max_new_tokens,
                stop_token_ids=inputs.stop_token_ids,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                min_p=rollout.min_p,
                score_token_id=inputs.score_token_id if engine_scores else None,
                routing=routing_shape(config) if config.moe.routing_replay else None,
            ),
            prompts_per_step=rollout.prompts_per_step,
            tries=rollout_tries(config) if rollout.drop_uniform_groups else None,
            fewest_groups=config.policy.minibatches,
            decode=partial(decode_response, inputs.tokenizer),
            deadline=rollout.deadline,
            seed=config.run.seed,
            timers=self._timers,
            oversample=rollout.oversample,
            max_staleness=rollout.max_staleness,
            ahead=rollout.ahead,
            frozen=not trains(config),
            endings=watch_endings(config, inputs.stop_token_ids, inputs.tokenizer),
            function=self._function,
            graders=self._graders,
        )
        self._ahead = RolloutAhead(self._collector, inputs.train) if rollout.ahead else None
        if self._ahead is not None:
            self._close_later("rollout ahead", self._ahead.close)
        if resumed is not None and resumed["run"] is not None:  # None: converted from a Hugging Face folder
            self._load_state(resumed["run"])
        last_step = -1 if resumed is None else int(resumed["step"])
        self._last_step = max(0, last_step)
        self._record = RunRecorder(config, inputs.folder, resumed)
        self._close_later("metrics", self._record.close)
        self._evaluation = RunEvaluation(
            config,
            {"validation": inputs.validation, "test": inputs.test},
            self.engine,
            self._grading,
            self._timers,
            tokenizer=inputs.tokenizer,
            stop_token_ids=inputs.stop_token_ids,
            score_token_id=inputs.score_token_id,
            last_step=last_step,
            say=self._record.message,
            resumed=None if resumed is None else resumed["run"],
            function=self._function,
            graders=self._graders,
        )

    def _close_later(self, what: str, close: Callable[[], object]) -> None:
        """What ends the run is not to be hidden by what fails while it ends."""

        def closing() -> None:
            try:
                close()
            except Exception as error:
                logger.warning("closing the %s failed: %s: %s", what, type(error).__name__, error)

        self._closing.callback(closing)

    def collect(self, step: int) -> WorkResult:
        """Get the graded groups of step `step` into `batch`.

        Returns:
            "" when they are there; `NEEDS_WEIGHTS` when the servers must be synced first, after which another call
            goes on where this one was; `STOPPED` and the reason, after which the state is that before the step;
            else why the run has to stop.
        """

        self._record.events.step = step
        self._collecting = StopEarly()
        if self._stop_reason:
            self._collecting.set()

        def work() -> None:
            source = self._collector if self._ahead is None else self._ahead
            with self._speed.waiting():
                self._batch = source.collect(step, stop=self._collecting)

        try:
            return call_engine(f"rollout of step {step}", work)
        except StoppedEarly:
            return f"{STOPPED}{self._stop_reason}"

    def start_ahead(self, step: int) -> None:
        """With `rollout.ahead`: start on the rollout of `step` while another one is trained."""
        if self._ahead is not None and step <= self._config.run.steps:
            self._ahead.begin(step)

    def finish_ahead(self) -> WorkResult:
        """Wait until nothing is being generated, so that weights may change."""
        ahead = self._ahead
        if ahead is None:
            return ""
        # The collection ends at its own deadline, and says more about it.
        patience = self._config.rollout.deadline + _AHEAD_SLACK
        with self._timers("generate_ahead"), self._speed.waiting():
            return call_engine("waiting for the rollout ahead", lambda: ahead.wait(patience))

    def await_servers(self) -> WorkResult:
        """Wait for servers that can be given weights: "" or why the run has to stop."""
        return call_engine("waiting for servers", lambda: await_servers(self._config, self.engine))

    @property
    def batch(self) -> RolloutBatch:
        """What `collect` got last."""
        assert self._batch is not None
        return self._batch

    def evaluate(self, step: int) -> WorkResult:
        """Evaluate on the validation split; `record` writes what comes out."""

        evaluation = self._evaluation
        if evaluation is None:
            return ""

        def work() -> None:
            with evaluation.left_out_on_stop():
                self._evaluated = evaluation.run("validation", step) | self._timers.collect()

        return call_engine(f"evaluation after step {step}", work)

    def evaluate_first(self) -> WorkResult:
        """Before the first step of this start: evaluate the initial model, so that the report can say what training
        changed, or make up for an evaluation that a stop left out."""
        settings, step, evaluation = self._config.evaluation, self._last_step, self._evaluation
        if evaluation is None:
            return ""
        metrics: dict[str, float] = {}

        def work() -> None:
            with evaluation.left_out_on_stop():
                found = evaluation.run("validation", step) if settings.every else {}
                metrics.update(found | (evaluation.run("test", 0) if step == 0 else {}))

        due = settings.baseline if step == 0 else evaluation_due(self._config, step)
        if not due or (step > 0 and evaluation.is_done("validation", step)):
            return ""
        trouble = call_engine(f"evaluation of the weights of step {step}", work)
        if trouble or not metrics:
            return trouble
        return self._record.write(step, metrics | self._timers.collect())

    def record(self, step: int, result: StepResult, times: dict[str, float]) -> WorkResult:
        """Write down one step. Returns "" or why the run has to stop, as `RunRecorder.write`."""
        batch = self.batch
        metrics: dict[str, Any] = rollout_metrics(batch, result.zc_logprobs, result.scores)
        metrics |= readout_metrics(batch, result.readouts[1:])
        metrics |= batch.metrics | result.metrics | times | platform.memory_gib()
        tokens = sum(sample.length for sample in batch.samples())
        metrics["tokens"] = tokens
        metrics["time/tokens_per_second"] = tokens / max(times.get("time/total", 0.0), 1e-9)
        metrics |= self._speed.metrics(batch, result, metrics)
        metrics |= (progress := self._progress())
        metrics |= self._evaluated
        self._evaluated = {}
        trouble = self._record.keep(batch, progress, self._origin)
        trouble = self._record.write(step, metrics) or trouble
        if step % _HISTOGRAM_STEPS == 0:
            self._record.histograms(step, scores_by_label(batch, result.scores))
        self._record.dump(batch, result.scores, result.advantages, lambda: self._token_part(result))
        return trouble

    def _token_part(self, result: StepResult) -> TokenPart:
        readings = readings_by_sample(result.readouts, len(result.scores))
        return TokenPart(result.tokens, readings, partial(decode_response, self._inputs.tokenizer))

    def _origin(self) -> dict[str, Any]:
        """What is kept with a batch of where it comes from."""
        inputs = self._inputs
        return origin_of(
            self._config,
            stop_token_ids=inputs.stop_token_ids,
            score_token_id=inputs.score_token_id,
            data_fingerprints=inputs.data_fingerprints,
        )

    def _progress(self) -> dict[str, float]:
        """How often each source of problems has been gone through, as metrics."""
        found = {"epoch": self._cursor.progress}
        if isinstance(self._cursor, MixedCursor):
            epochs = self._cursor.progress_by_source()
            found |= {f"source/{name}/epoch": value for name, value in epochs.items()}
        return found

    def servers_busy(self) -> list[tuple[str, float, float]]:
        """When each server had requests since the last call; none without servers."""
        return self.engine.take_busy() if isinstance(self.engine, SglangEngine) else []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of rank 0: cursor, groups that are begun, a batch that is ahead, whose run it is."""
        state = self._collector.state() if self._ahead is None else self._ahead.state()
        kept = {} if self._evaluation is None else self._evaluation.keeping.state()
        return state | self._record.state() | {"reward_code": self._reward_code()} | kept

    def judged(self) -> str:
        """What follows from the last evaluation, as `Judged.text`."""
        return "" if self._evaluation is None else self._evaluation.keeping.judged().text

    def _reward_code(self) -> dict[str, str]:
        code: dict[str, str] = {}
        for pool in (self._grading, *self._graders.values()):
            code |= pool.source_fingerprints()
        return code

    def _load_state(self, state: dict[str, Any]) -> None:
        before, now = state.get("reward_code", {}), self._reward_code()
        self._edited = sorted(path for path in before.keys() & now.keys() if before[path] != now[path])
        for pool in (self._grading, *self._graders.values()):
            pool.say_if_edited_since(state.get("reward_code", {}))
        if self._ahead is None:
            self._collector.load_state(state)
        else:
            self._ahead.load_state(state)

    def announce(self, ranks: int, checkpoints: CheckpointManager) -> None:
        """The banner, once everything is open; see `gather_facts`."""
        config, inputs, engine = self._config, self._inputs, self.engine if generates(self._config) else None

        def announce() -> None:
            self._record.announce(
                gather_facts(config, inputs, engine, ranks, self._resumed, checkpoints, self._edited)
            )

        BestEffort("the run's banner", Exception)(announce)

    @property
    def recorder(self) -> RunRecorder:
        """The files of the run."""
        return self._record

    def stop(self, reason: str) -> None:
        """End a rollout or an evaluation that runs, and every later one, soon; safe in a signal handler.

        A rollout ahead is finished, with the weights that it began with."""
        self._stop_reason = reason
        self._collecting.set()
        if self._evaluation is not None:
            self._evaluation.stop(reason)

    def evaluate_last(self, end: End) -> WorkResult:
        """Evaluate the final weights on the test split; stopped, the same command goes on with what was sampled."""
        steps, evaluation = end.step, self._evaluation
        metrics: dict[str, float] = {}

        def work() -> None:
            if evaluation is not None:
                metrics.update(evaluation.run("test", steps, resumable=True))

        try:
            trouble = call_engine("final evaluation", work)
        except StoppedEarly:
            return f"{STOPPED}{self._stop_reason}"
        if trouble:
            return trouble
        if metrics:
            summary = ", ".join(
                f"{name} {metrics[key]:.3f}" for name, key in _HEADLINES.items() if key in metrics
            )
            self._record.message(f"test split after step {steps}: {summary}")
            self._record.events.add("evaluation", f"test split after step {steps}: {summary}", steps)
        return ""

    def finish(self, end: End, *, complete: bool) -> WorkResult:
        """Write the best model and the report; `complete`: the same command will not start again."""
        self._record.export_best()
        return self._record.finish(end.step, early=end.early, complete=complete)

    def close(self) -> None:
        """Stop workers and close files; safe after a failure and safe to call twice."""
        self._closing.close()


_HEADLINES = {
    "accuracy": "test/accuracy",
    "majority": "test/majority",
    "weighted majority": "test/weighted_majority",
    "self-reward F1": "test/self_reward_f1",
    "AUROC": "test/self_reward_auroc",
}
