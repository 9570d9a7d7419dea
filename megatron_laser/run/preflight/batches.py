"""The batches of `run.mode: train_only`: enough of them, and made by settings that are this run's."""

from __future__ import annotations

from pathlib import Path

from megatron_laser.config import RunConfig
from megatron_laser.errors import Finding
from megatron_laser.run.batch_origin import origin_problems
from megatron_laser.run.preflight.finding_log import needed
from megatron_laser.run.preflight.model import ModelInputs
from megatron_laser.run.recorded_batches import read_origin, recorded_steps

_TOPIC = "batches"


def batch_findings(config: RunConfig, model: ModelInputs) -> list[Finding]:
    """What the run would train on; the first and the last batch are looked at, each of them when it is read.

    Raises:
        DataError: a batch's description cannot be read.
    """
    if config.run.batches is None:
        return [Finding(_TOPIC, "ok", "made up: no data is read")]
    special = needed(model.special, "the ids that end a response")
    folder = Path(config.run.batches)
    steps = recorded_steps(folder)
    if not steps:
        there = "is not there" if not folder.is_dir() else "holds no batch (step_N.json beside step_N.npz)"
        return [
            Finding(
                _TOPIC, "error", f"run.batches {folder} {there}",
                cure="name the batches/ of a run with run.mode rollout_only, or with logging.record_batches_every",
            )
        ]  # fmt: skip
    if len(steps) < config.run.steps:
        return [
            Finding(
                _TOPIC, "error", f"run.batches {folder} holds {len(steps)} batches for run.steps {config.run.steps}",
                cure=f"set run.steps to {len(steps)} or fewer",
            )
        ]  # fmt: skip
    used = steps[: config.run.steps]
    origins = [read_origin(folder, step) for step in dict.fromkeys((used[0], used[-1]))]
    problems = [
        problem
        for origin in origins
        for problem in origin_problems(config, origin, special.stop_token_ids, special.score_token_id)
    ]
    if problems:
        cure = "use that setting"
        if config.rollout.limit is not None:
            cure += f" (rollout.limit {config.rollout.limit} makes this run's smaller: try without it, and run.steps)"
        return [
            Finding(_TOPIC, "error", f"run.batches {folder}: {problem}", cure=cure)
            for problem in dict.fromkeys(problems)
        ]
    text = f"{len(steps)} in {folder}, of run {origins[0]['run']!r}"
    findings = [Finding(_TOPIC, "ok", text)]
    if Path(origins[0]["model"]) != Path(config.model.path):
        findings.append(
            Finding(
                _TOPIC, "warning", f"{text} sampled from {origins[0]['model']}, and {config.model.path} is trained",
                cure="look at logprob_diff_mean; policy.importance_cap corrects for another policy",
            )
        )  # fmt: skip
    return findings
