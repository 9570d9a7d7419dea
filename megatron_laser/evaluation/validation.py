"""Evaluations of a training run: of the weights that its engine holds, on its validation and test splits."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_laser.config import RunConfig, evaluation_max_new_tokens
from megatron_laser.config.derived import Source, data_sources
from megatron_laser.data.tokenizer import decode_response
from megatron_laser.evaluation.evaluator import evaluate
from megatron_laser.evaluation.keeping import Keeping
from megatron_laser.evaluation.progress import Progress
from megatron_laser.evaluation.responses import EvaluationEngine, generation_batch, partial_responses_path
from megatron_laser.evaluation.score_rule import ScoreRule
from megatron_laser.evaluation.weight_identity import engine_digest
from megatron_laser.observability.timers import Timers
from megatron_laser.rewards import GradingPool
from megatron_laser.rollout.client.errors import ServerGone
from megatron_laser.rollout.engine import RolloutEngine, StopEarly, StoppedEarly
from megatron_laser.rollout.function.as_engine import FunctionAsEngine
from megatron_laser.rollout.function.runner import SampleFunction
from megatron_laser.rollout.open_files import named_servers
from megatron_laser.types import Prompt, SamplingParams

logger = logging.getLogger(__name__)

_NAME = re.compile(r".+_step_(\d+)\.jsonl?")


class RunEvaluation:
    """Evaluates on request; `stop` ends one that runs, and every later one, within seconds."""

    def __init__(
        self,
        config: RunConfig,
        splits: Mapping[str, Sequence[Prompt] | None],
        engine: RolloutEngine,
        grading: GradingPool,
        timers: Timers,
        *,
        tokenizer: Any,
        stop_token_ids: tuple[int, ...],
        score_token_id: int | None,
        last_step: int,
        say: Callable[[str], None],
        resumed: Mapping[str, Any] | None = None,
        function: SampleFunction | None = None,
        graders: Mapping[str, GradingPool] | None = None,
    ) -> None:
        """Remove evaluations of steps beyond `last_step`, where the run goes on: they are of weights that are gone.

        Args:
            splits: prompts of "validation" and "test"; None or missing: that split is not given.
            say: takes a line every 15 seconds that an evaluation goes on, from another thread.
            resumed: rank 0's part of the checkpoint's state, for what is kept of evaluations.
            function: makes the responses, as in training.
            graders: for prompts whose `reward` is not `grading`'s.
        """
        self.keeping = Keeping(config, resumed)
        self._function = function
        self._config = config
        self._splits = splits
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._score_token_id = score_token_id
        self._engine = engine
        self._grading = grading
        self._graders = graders
        self._timers = timers
        self._say = say
        self._folder = Path(config.run.output_dir) / "evaluation"
        self._stop = StopEarly()
        self.stop_reason = ""
        for path in self._folder.glob("*_step_*.json*"):
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) > last_step:
                path.unlink(missing_ok=True)

    def stop(self, reason: str) -> None:
        """Safe in a signal handler."""
        self.stop_reason = reason
        self._stop.set()

    @contextmanager
    def left_out_on_stop(self) -> Iterator[None]:
        """What is evaluated in here may be missing when the run is stopped."""
        try:
            yield
        except StoppedEarly as error:
            logger.warning("%s: an evaluation is left out (%s)", self.stop_reason, error)

    def is_done(self, split: str, step: int) -> bool:
        """Whether its numbers are there."""
        return (self._folder / f"{split}_step_{step}.json").exists()

    def run(self, split: str, step: int, *, resumable: bool = False) -> dict[str, float]:
        """Evaluate the engine's current weights on `validation` or `test`; {} when the split is not given.

        Names are eval/<metric> for validation and test/<metric> for test; of each of several sources
        eval/source/<name>/<metric>.

        Args:
            resumable: go on with the responses that a stopped attempt has sampled from the same weights.

        Raises:
            StoppedEarly: after `stop`; with `resumable`, what has been sampled is kept.
        """
        config, settings = self._config, self._config.evaluation
        prompts = self._splits.get(split)
        if not prompts:
            return {}
        sources = {source.name: source for source in data_sources(config, split)}
        prompts = _first_of_each_source(
            prompts, {name: source.max_prompts or settings.max_prompts for name, source in sources.items()}
        )
        sampling = SamplingParams(
            samples_per_prompt=settings.samples_per_prompt
            if split == "validation"
            else settings.final_samples_per_prompt,
            max_new_tokens=evaluation_max_new_tokens(config),
            stop_token_ids=self._stop_token_ids,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        own = {name: _sampled(sampling, source) for name, source in sources.items()}
        responses_in_all = sum(own.get(prompt.source, sampling).samples_per_prompt for prompt in prompts)
        in_process = config.rollout.engine == "in_process"
        batch = generation_batch(
            in_process=in_process,
            max_batch_size=config.rollout.max_batch_size,
            max_concurrency=config.rollout.max_concurrency_per_server * named_servers(config.rollout),
        )
        engine: EvaluationEngine = self._engine
        if self._function is not None:
            engine = FunctionAsEngine(self._function, self._engine, prompts)
        progress = Progress(f"{split} split after step {step}", responses_in_all, say=self._say)
        records = self._folder / f"{split}_step_{step}.jsonl"
        with self._timers("evaluate"), progress:
            responses = self._responses(records, prompts, sampling, own, batch) if resumable else None
            records.unlink(missing_ok=True)  # an earlier attempt's verdicts are made anew
            summary = evaluate(
                engine,
                prompts,
                sampling=sampling,
                decode=partial(decode_response, self._tokenizer),
                grading=self._grading,
                rule=ScoreRule.of(config, self._score_token_id),
                records_path=records,
                deadline=config.rollout.deadline,
                generation_batch=batch,
                responses_path=responses,
                repeatable=in_process and self._function is None,  # tools may answer differently
                on_response=progress.response,
                stop=self._stop,
                graders=self._graders,
                own_sampling=own,
            )
            if responses is not None:
                responses.unlink(missing_ok=True)
        if split != "validation":
            return summary.prefixed("test/")
        metrics = summary.prefixed("eval/")
        self.keeping.add(step, metrics)
        return metrics

    def _responses(
        self,
        records: Path,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        own: Mapping[str, SamplingParams],
        batch: int,
    ) -> Path | None:
        """Where responses of just these weights are kept; None where the engine does not tell them from others."""
        try:
            weights = engine_digest(self._engine)
        except ServerGone:  # the others will answer, but nothing is kept for a later attempt
            return None
        if weights is None:
            return None
        identity: dict[str, Any] = {
            "weights": weights,
            "prompts": [[prompt.row, list(prompt.token_ids)] for prompt in prompts],
            "score_token_id": self._score_token_id,
            "batch": batch,
            **asdict(sampling),
        }
        if differing := {name: asdict(one) for name, one in own.items() if one != sampling}:
            identity["own_sampling"] = differing
        if self._function is not None:
            rollout = self._config.rollout
            identity |= {"function": rollout.function, "function_options": rollout.function_options}
        return partial_responses_path(records, identity)


def _sampled(sampling: SamplingParams, source: Source) -> SamplingParams:
    """How a source's prompts are sampled: as it says, else as all."""
    own = {"samples_per_prompt": source.samples_per_prompt, "temperature": source.temperature}
    return replace(sampling, **{name: value for name, value in own.items() if value is not None})  # type: ignore[arg-type]


def _first_of_each_source(prompts: Sequence[Prompt], counts: Mapping[str, int | None]) -> list[Prompt]:
    """At most `counts` prompts of each source; None: all."""
    taken: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        taken[prompt.source] += 1
        count = counts.get(prompt.source)
        if count is None or taken[prompt.source] <= count:
            chosen.append(prompt)
    return chosen


def evaluation_due(config: RunConfig, step: int) -> bool:
    """Whether the validation split is evaluated after `step`: every n steps, and after the last one."""
    every = config.evaluation.every
    return every > 0 and (step % every == 0 or step == config.run.steps)
