"""What only rank 0 has: prompts, engine, graders, and everything that a run writes down."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from megatron_laser.config import (
    ConfigError,
    RunConfig,
    evaluation_max_new_tokens,
    read_architecture,
    read_stop_token_ids,
    resolve_score_token,
)
from megatron_laser.data import PromptCursor, build_prompts, fingerprint, read_rows
from megatron_laser.evaluation import evaluate
from megatron_laser.model import platform
from megatron_laser.model.dtypes import DTYPES
from megatron_laser.observability.live import LiveView
from megatron_laser.observability.report import write_report
from megatron_laser.observability.rollout_dump import dump_rollouts
from megatron_laser.observability.rollout_metrics import rollout_metrics
from megatron_laser.observability.sinks import MetricsLogger
from megatron_laser.observability.timers import Timers
from megatron_laser.output_folder import STOPPED, ClaimedFolder, claim_output_folder
from megatron_laser.rewards import GradingPool, resolve_reward
from megatron_laser.rollout.collector import RolloutCollector
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.trainer.trainer import StepResult
from megatron_laser.types import Prompt, RolloutBatch, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """The user's files, read and checked before any model is built."""

    tokenizer: Any
    train: list[Prompt]
    validation: list[Prompt] | None
    test: list[Prompt] | None
    score_token_id: int | None
    stop_token_ids: tuple[int, ...]
    data_fingerprint: str
    folder: ClaimedFolder

    def shared_arrays(self) -> dict[str, np.ndarray]:
        """What the other ranks need of it; -1 stands for no score token."""
        score = -1 if self.score_token_id is None else self.score_token_id
        return {"score_token_id": np.array(score, dtype=np.int64)}


def read_inputs(config: RunConfig) -> RunInputs:
    """Read tokenizer and data, resolve score token and reward function, and claim the output folder.

    Raises:
        ConfigError, DataError, RewardSpecError: with the setting or the file and line that is wrong.
    """
    resolve_reward(config.reward.function)
    architecture = read_architecture(config.model.path)
    stop_token_ids = config.rollout.stop_token_ids or read_stop_token_ids(config.model.path)
    if not stop_token_ids:
        raise ConfigError(
            [f"model.path {config.model.path} names no eos_token_id; set rollout.stop_token_ids"]
        )
    score_token_id = None
    if config.laser.score_token is not None:
        token = resolve_score_token(config.model.path, config.laser.score_token)
        score_token_id = token.id
        if not token.verified:
            logger.warning("laser.score_token %r is unverified: %s", config.laser.score_token, token.note)
    if config.laser.enabled and score_token_id is None:
        raise ConfigError(
            [
                f"laser.score_token {config.laser.score_token!r} has no id in the tokenizer of {config.model.path}"
            ]
        )
    tokenizer = AutoTokenizer.from_pretrained(str(config.model.path), local_files_only=True)

    def prompts(paths: Any) -> list[Prompt] | None:
        if paths is None:
            return None
        data = config.data
        rows = read_rows(paths, prompt_key=data.prompt_key, answer_key=data.answer_key)
        return build_prompts(
            rows,
            tokenizer,
            prompt_suffix=data.prompt_suffix,
            apply_chat_template=data.apply_chat_template,
            max_prompt_tokens=data.max_prompt_tokens,
            vocab_size=architecture.vocab_size,
        )[0]

    train = prompts(config.data.train) or []
    return RunInputs(
        tokenizer=tokenizer,
        train=train,
        validation=prompts(config.data.validation),
        test=prompts(config.data.test),
        score_token_id=score_token_id,
        stop_token_ids=tuple(stop_token_ids),
        data_fingerprint=fingerprint(config.data.train, [config.data.prompt_key, config.data.answer_key]),
        folder=claim_output_folder(config),
    )


class Leader:
    """Rank 0's side of the loop: collect a rollout, record a step, evaluate, finish."""

    def __init__(
        self, config: RunConfig, inputs: RunInputs, timers: Timers, *, resumed: dict[str, Any] | None = None
    ) -> None:
        """Start engine and graders; `resumed` is the checkpoint's state, whose cursor and step are taken over."""
        self._config = config
        self._inputs = inputs
        self._timers = timers
        self._folder = Path(config.run.output_dir)
        self._started = time.monotonic()
        self.engine = InProcessEngine(
            config.model.path,
            dtype=DTYPES[config.model.dtype],
            device=platform.device(),
            max_batch_size=config.rollout.max_batch_size,
        )
        self._grading = GradingPool(
            workers=config.reward.workers, deadline=config.reward.deadline, function=config.reward.function
        )
        rollout = config.rollout
        engine_scores = config.laser.enabled and config.laser.score_source == "server"
        self._cursor = PromptCursor(
            len(inputs.train), config.run.seed, config.data.shuffle, data_fingerprint=inputs.data_fingerprint
        )
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
                score_token_id=inputs.score_token_id if engine_scores else None,
            ),
            prompts_per_step=rollout.prompts_per_step,
            decode=self._decode,
            deadline=rollout.deadline,
            seed=config.run.seed,
            timers=timers,
        )
        if resumed is not None:
            self._cursor.load_state_dict(resumed["run"]["cursor"])
        # A fresh start in a folder without a checkpoint drops what an earlier attempt wrote.
        self._metrics = MetricsLogger(
            self._folder,
            tensorboard=config.logging.tensorboard,
            last_step=-1 if resumed is None else int(resumed["step"]),
        )
        self._view = LiveView(config.run.steps, mode=config.logging.live, title=config.run.name)
        self._view.__enter__()

    def collect(self, step: int) -> RolloutBatch:
        """The graded groups of step `step`."""
        return self._collector.collect(step)

    def record(self, step: int, batch: RolloutBatch, result: StepResult) -> None:
        """Write one step's metrics, update the view, and dump the rollouts when they are due."""
        times = self._timers.collect()
        metrics: dict[str, Any] = rollout_metrics(batch, result.zc_logprobs, result.scores)
        metrics |= result.metrics | times | platform.memory_gib()
        tokens = sum(sample.length for sample in batch.samples())
        metrics["tokens"] = tokens
        metrics["time/tokens_per_second"] = tokens / max(times.get("time/total", 0.0), 1e-9)
        metrics["epoch"] = self._cursor.progress
        if evaluation_due(self._config, step):
            metrics |= self._evaluate("validation", step)
            metrics |= self._timers.collect()
        self._write(step, metrics)
        every = self._config.logging.rollouts_every
        if every and step % every == 0:
            path = self._folder / "rollouts" / f"step_{step}.jsonl"
            dump_rollouts(path, batch, result.scores, result.advantages)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of rank 0. Every rollout is trained on before a save: nothing is pending."""
        return {"cursor": self._cursor.state_dict(), "pending_groups": []}

    def stopped(self, step: int, reason: str) -> None:
        """Say that the run stopped early and can be continued."""
        note = {"step": step, "reason": reason}
        (self._folder / STOPPED).write_text(json.dumps(note) + "\n", encoding="utf-8")
        self._view.message(
            f"stopped after step {step} ({reason}); saved: the same command continues from here"
        )

    def evaluate_baseline(self) -> None:
        """Evaluate the initial model, so that the report can say what training changed."""
        if not self._config.evaluation.baseline:
            return
        metrics = self._evaluate("validation", 0) if self._config.evaluation.every else {}
        metrics |= self._evaluate("test", 0)
        if metrics:
            self._write(0, metrics | self._timers.collect())

    def finish(self) -> Path:
        """Evaluate the final weights on the test split and write the report; returns its path."""
        steps = self._config.run.steps
        metrics = self._evaluate("test", steps)
        if metrics:
            summary = ", ".join(
                f"{name} {metrics[key]:.3f}" for name, key in _HEADLINES.items() if key in metrics
            )
            self._view.message(f"test split after step {steps}: {summary}")
        self._view.__exit__(None, None, None)
        path = write_report([self._folder])
        logger.info("finished in %.0f s; report: %s", time.monotonic() - self._started, path)
        return path

    def close(self) -> None:
        """Stop workers and close files; safe after a failure and safe to call twice."""
        self._view.__exit__(None, None, None)
        self._metrics.close()
        self._grading.close()
        self.engine.close()
        self._inputs.folder.release()

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        self._metrics.log(step, metrics)
        self._view.update(step, metrics)

    def _evaluate(self, split: str, step: int) -> dict[str, float]:
        """Evaluate the engine's current weights on `validation` or `test`; {} when the split is not given.

        Names are eval/<metric> for validation and test/<metric> for test.
        """
        config, settings = self._config, self._config.evaluation
        prompts = self._inputs.validation if split == "validation" else self._inputs.test
        if not prompts:
            return {}
        samples = settings.samples_per_prompt if split == "validation" else settings.final_samples_per_prompt
        with self._timers("evaluate"):
            summary = evaluate(
                self.engine,
                prompts[: settings.max_prompts],
                sampling=SamplingParams(
                    samples_per_prompt=samples,
                    max_new_tokens=evaluation_max_new_tokens(config),
                    stop_token_ids=self._inputs.stop_token_ids,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=settings.seed,
                ),
                decode=self._decode,
                grading=self._grading,
                score_token_id=self._inputs.score_token_id,
                ref_logprob=config.laser.ref_logprob,
                beta=config.laser.beta,
                records_path=self._folder / "evaluation" / f"{split}_step_{step}.jsonl",
                deadline=config.rollout.deadline,
                generation_batch=config.rollout.max_batch_size,
            )
        return summary.prefixed("eval/" if split == "validation" else "test/")

    def _decode(self, ids: list[int]) -> str:
        return self._inputs.tokenizer.decode(ids, skip_special_tokens=True)


_HEADLINES = {
    "accuracy": "test/accuracy",
    "majority": "test/majority",
    "weighted majority": "test/weighted_majority",
    "self-reward F1": "test/self_reward_f1",
    "AUROC": "test/self_reward_auroc",
}


def evaluation_due(config: RunConfig, step: int) -> bool:
    """Whether the validation split is evaluated after `step`: every n steps, and after the last one."""
    every = config.evaluation.every
    return every > 0 and (step % every == 0 or step == config.run.steps)
