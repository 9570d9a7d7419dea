"""A finished (or running) run, read back from its output folder."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_laser.config import ConfigError
from megatron_laser.config.yaml_source import read_yaml
from megatron_laser.observability.metrics_logger import read_metrics
from megatron_laser.observability.readout_fields import readout_names
from megatron_laser.rewards.grade import FAILED_OUTCOMES

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
_SUMMARY_NAME = re.compile(r"(?P<split>.+)_step_(?P<step>\d+)\.json")
_OF_SOURCE = re.compile(r"(?:eval/|test/)?source/([^/]+)/")

_RATE = "time/tokens_per_second"  # depends on the clock like a time, but is none


@dataclass
class Evaluation:
    """One evaluation of a run: a split at a step. `summary` has the names of `evaluation.summarize`."""

    split: str
    step: int
    summary: dict[str, Any]
    records_path: Path

    def number(self, name: str) -> float:
        """A summary's number; NaN where it is missing or null."""
        value = self.summary.get(name)
        return math.nan if value is None else float(value)

    @property
    def max_k(self) -> int:
        """Responses per problem, 0 when unknown."""
        value = self.number("samples_per_prompt")
        return int(value) if math.isfinite(value) else 0

    def curve(self, way: str) -> FloatArray:
        """<way>_at_k for k = 1..K; empty when it was not measured."""
        values = [self.number(f"{way}_at_{k}") for k in range(1, self.max_k + 1)]
        return np.array(values if all(map(math.isfinite, values)) else [])

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The responses without their texts; empty when the file is missing."""
        if not self.records_path.exists():
            return []
        wanted = ("row", "sample", "reward", "score", "outcome", "mean_logprob", "response_ids_length")
        with self.records_path.open(encoding="utf-8") as file:
            try:
                return [{name: record.get(name) for name in wanted} for record in map(json.loads, file)]
            except ValueError as error:
                problem = f"cannot be read as JSON: {error}; delete it to report without it"
                raise ConfigError([problem], str(self.records_path)) from error

    @property
    def scored_records(self) -> list[dict[str, Any]]:
        """Those that have a score and a verdict to compare it with."""
        return [r for r in self.records if r["score"] is not None and r["outcome"] not in FAILED_OUTCOMES]

    def scores(self) -> tuple[FloatArray, NDArray[np.bool_]]:
        """(scores, right) of `scored_records`."""
        scored = self.scored_records
        return (
            np.array([record["score"] for record in scored], dtype=np.float64),
            np.array([record["reward"] > 0.5 for record in scored], dtype=np.bool_),
        )

    def accuracy_by_row(self) -> dict[int, float]:
        """Problem -> share of right responses."""
        rewards: dict[int, list[bool]] = {}
        for record in self.records:
            rewards.setdefault(record["row"], []).append(record["reward"] > 0.5)
        return {row: sum(values) / len(values) for row, values in rewards.items()}


@dataclass
class Run:
    """`kind` is LaSeR or GRPO (a LaSeR configuration with alpha 0 trains no score), "" without a config.yaml."""

    folder: Path
    label: str
    kind: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)

    @property
    def training_rows(self) -> list[dict[str, Any]]:
        """Rows of steps that trained, from step 1."""
        return [row for row in self.rows if row["step"] >= 1]

    @property
    def steps(self) -> int:
        """The last step that trained, 0 without one."""
        return max((row["step"] for row in self.training_rows), default=0)

    def series(self, name: str) -> tuple[FloatArray, FloatArray]:
        """(steps, values) where the metric is a finite number."""
        pairs = [(row["step"], row[name]) for row in self.rows if _is_finite(row.get(name))]
        return np.array([step for step, _ in pairs], float), np.array([value for _, value in pairs], float)

    @cached_property
    def sources(self) -> list[str]:
        """Names of the data's sources, where there are several."""
        names = {match[1] for row in self.rows for name in row if (match := _OF_SOURCE.match(name))}
        for evaluation in (one for split in self.evaluations.values() for one in split):
            names |= {match[1] for name in evaluation.summary if (match := _OF_SOURCE.match(name))}
        return sorted(names)

    def source_accuracy(self, source: str) -> str:
        """`accuracy`, of one source."""
        return f"source/{source}/{self.accuracy}"

    @property
    def accuracy(self) -> str:
        """The metric that has the policy's accuracy while training: over everything graded, dropped groups too."""
        return "accuracy_tried" if len(self.series("accuracy_tried")[0]) else "reward_mean"

    def ends(self, name: str) -> tuple[float, float]:
        """Means over the first and the last tenth of a series; NaN without one."""
        _, values = self.series(name)
        if len(values) == 0:
            return math.nan, math.nan
        tenth = max(1, len(values) // 10)
        return float(values[:tenth].mean()), float(values[-tenth:].mean())

    @cached_property
    def further_readouts(self) -> list[str]:
        """Names of the readouts besides the response's score, in their order."""
        return readout_names(name for row in self.rows for name in row)

    def evaluation_series(self, name: str) -> tuple[FloatArray, FloatArray]:
        """(steps, values) on validation: from its summaries, else eval/<name> in metrics.jsonl."""
        evaluations = self.evaluations.get("validation")
        if not evaluations:
            return self.series(f"eval/{name}")
        values = np.array([evaluation.number(name) for evaluation in evaluations])
        steps = np.array([evaluation.step for evaluation in evaluations], float)
        return steps[np.isfinite(values)], values[np.isfinite(values)]

    @property
    def final(self) -> Evaluation | None:
        """The last evaluation on test, else on any other split."""
        for split in ("test", *sorted(self.evaluations)):
            if self.evaluations.get(split):
                return self.evaluations[split][-1]
        return None

    def phases(self) -> dict[str, float]:
        """Mean seconds per step of each phase that metrics.jsonl has under time/."""
        rows = self.training_rows
        names = {name for row in rows for name in row if name.startswith("time/") and name != _RATE}
        means = {
            name.removeprefix("time/"): sum(row[name] for row in rows if _is_finite(row.get(name)))
            / len(rows)
            for name in sorted(names)
        }
        return {name: value for name, value in means.items() if value > 0}

    def first_steps(self) -> tuple[int | None, int | None]:
        """First step with a self-reward loss, and with scores in the advantages, of any readout; None: none has it."""
        laser = self.config.get("laser") or {}
        losses, advantages = [], []
        for index, entry in enumerate(_readouts(self.config)):
            warmup, more = (
                _number(entry, name, _number(laser, inherited, 200))
                for name, inherited in (
                    ("warmup_steps", "reasoning_warmup_steps"),
                    ("advantages_warmup_steps", "self_reward_warmup_steps"),
                )
            )
            if _number(entry, "weight", _number(laser, "alpha", 0.1)):
                losses.append(int(warmup) + 1)
            effect = entry.get("advantages") or ("none" if index else "mix")
            if effect != "none" and (effect != "mix" or _number(entry, "tau", _number(laser, "tau", 0.1))):
                advantages.append(int(warmup + more) + 1)
        return min(losses, default=None), min(advantages, default=None)


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every folder; labels are unique.

    Raises:
        ValueError: no folders. FileNotFoundError: a folder has no metrics.jsonl.
    """
    if not folders:
        raise ValueError("a report needs at least one run's output folder")
    runs = [_load(Path(folder)) for folder in folders]
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = f"{run.label} ({run.folder.name})"
    for number, run in enumerate(runs, start=1):
        if sum(other.label == run.label for other in runs) > 1:
            run.label = f"{run.label} #{number}"
    return runs


def _load(folder: Path) -> Run:
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise FileNotFoundError(f"{metrics} does not exist; expected the output_dir of a run")
    path = folder / "config.yaml"
    config = read_yaml(path).data if path.exists() else {}
    run = Run(
        folder=folder,
        label=str((config.get("run") or {}).get("name") or folder.resolve().name),
        kind=_kind(config),
        config=config,
        rows=read_metrics(metrics),
    )
    for path in sorted((folder / "evaluation").glob("*.json")):
        match = _SUMMARY_NAME.fullmatch(path.name)
        if match:
            try:
                summary = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(
                    [f"cannot be read as JSON: {error}; delete it to report without it"], str(path)
                ) from error
            evaluation = Evaluation(match["split"], int(match["step"]), summary, path.with_suffix(".jsonl"))
            run.evaluations.setdefault(match["split"], []).append(evaluation)
    for evaluations in run.evaluations.values():
        evaluations.sort(key=lambda evaluation: evaluation.step)
    return run


def _kind(config: dict[str, Any]) -> str:
    if not config:
        return ""
    alpha = _number(config.get("laser") or {}, "alpha", 0.1)
    return "LaSeR" if any(_number(entry, "weight", alpha) for entry in _readouts(config)) else "GRPO"


def _readouts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of `laser.readouts` as they stand there; none without LaSeR."""
    laser = config.get("laser")
    laser = laser if isinstance(laser, dict) else {}
    return (laser.get("readouts") or [{}]) if laser.get("enabled", True) else []


def _number(section: dict[str, Any], name: str, default: float) -> float:
    value = section.get(name)
    return default if value is None else float(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
