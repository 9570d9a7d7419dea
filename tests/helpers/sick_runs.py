"""Made-up metrics of runs: a healthy one, and one for each alarm, which has that disease; recorded ones beside them."""

from __future__ import annotations

import json
import lzma
import math
import random
from collections.abc import Callable
from functools import cache
from typing import Any

from helpers.source_tree import ROOT

Row = dict[str, Any]
ONSET = 160  # the first sick step
STEPS = 250


def recorded(name: str) -> list[Row]:
    """Rows of a real run, see tests/data/alarms/README.md."""
    data = (ROOT / "tests" / "data" / "alarms" / f"{name}.json.xz").read_bytes()
    columns = json.loads(lzma.decompress(data))
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def healthy_row(step: int, rng: random.Random) -> Row:
    """A step of a LaSeR run over two servers and four ranks that learns what it should."""
    share = step / STEPS

    def about(value: float, noise: float = 0.1) -> float:
        return value * (1.0 + noise * rng.uniform(-1.0, 1.0))

    right = about(0.4 + 0.3 * share)
    row: Row = {
        "step": step,
        "reward_mean": right,
        "accuracy_tried": right,
        "response_length_mean": about(300 * (1 + share)),
        "truncated_fraction": about(0.05, 1.0),
        "scored_fraction": 0.95,
        "groups_uniform_fraction": about(0.4),
        "prompts_tried": 16,
        "groups_dropped": 0,
        "outcome/correct": round(128 * right),
        "outcome/wrong": 118 - round(128 * right),
        "outcome/no_answer": 8,
        "outcome/unparsable": 2,
        "grading_failed": 0,
        "function_failed_timeout": 0,
        "function_failed_error": 0,
        "function_failed_invalid": 0,
        "self_reward_auroc": about(0.6 + 0.25 * share),
        "score_right_mean": about(0.6),
        "score_wrong_mean": about(0.4),
        "score_right_std": about(0.2),
        "score_wrong_std": about(0.2),
        "self_reward_loss": about(0.2),
        "entropy": about(0.3 * (1 - 0.6 * share)),
        "grad_norm": about(0.5, 0.8),
        "logprob_diff_mean": about(0.01),
        "rollout_k3_kl": about(0.0005),
        "bad_steps": 0,
        "rollout/servers": 2.0,
        "rollout/server_deaths": 0.0,
        "idle/servers": about(0.4),
        "idle/trainer": about(0.4),
        "time/total": 20.0,
        "time/train": 8.0,
        "time/logprob": 2.0,
        "time/generate": 9.0,
        "time/sync": 0.1,
        "plan/train_ratio": about(1.1),
        "plan/sync_ratio": about(5.0),  # of a phase that is a moment
        "plan/step_ratio": about(0.9),
    }
    if step <= 10:  # before its loss is trained
        row["self_reward_error"] = row.pop("self_reward_loss")
    if step % 10 == 0:
        row["drift/reference_mean"] = about(-0.6)
        row |= {"straggler/train": about(1.05, 0.05), "straggler/sync": about(3.0)}
        row["eval/accuracy"] = 0.4 + 0.2 * share
    return row


@cache
def _healthy_rows(seed: int) -> list[Row]:
    rng = random.Random(seed)
    return [healthy_row(step, rng) for step in range(1, STEPS + 1)]


def healthy_run(steps: int = STEPS, seed: int = 1) -> list[Row]:
    """`steps` healthy steps, at most STEPS."""
    return [dict(row) for row in _healthy_rows(seed)[:steps]]


def _set(**values: Any) -> Callable[[Row], None]:
    """Put these in place of what is there, of metrics that the row has; `__` stands for a slash."""
    changes = {name.replace("__", "/"): value for name, value in values.items()}

    def change(row: Row) -> None:
        row |= {name: value for name, value in changes.items() if name in row}

    return change


def _times(name: str, factor: float) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row[name] *= factor

    return change


def _one_death(row: Row) -> None:
    row["rollout/server_deaths"] = 1.0


def _one_bad_step(row: Row) -> None:
    row["bad_steps"] = 2.0 if row["step"] == ONSET + 3 else 0.0


# alarm -> what its disease does to the rows from ONSET on
DISEASES: dict[str, Callable[[Row], None]] = {
    "score_collapse": _set(self_reward_auroc=0.5),
    "score_flat": _set(
        score_right_mean=0.51, score_wrong_mean=0.505, score_right_std=0.004, score_wrong_std=0.003
    ),
    "score_shift": _set(score_right_mean=-0.3, score_wrong_mean=-0.5),
    "entropy_collapse": _set(entropy=0.002),
    "length_growth": _times("response_length_mean", 4.0),
    "length_shrink": _times("response_length_mean", 0.1),
    "truncated": _set(truncated_fraction=0.7),
    "unscored": _set(scored_fraction=0.2),
    "no_end": _set(truncated_fraction=1.0),
    "unreadable": _set(outcome__unparsable=80),
    "hacking_format": _set(reward_mean=0.35, accuracy_tried=0.35, outcome__wrong=70, outcome__correct=45),
    "hacking_score": _set(reward_mean=0.36, accuracy_tried=0.36, score_wrong_mean=0.75, score_right_mean=0.8),
    "hacking_validation": _set(eval__accuracy=0.3),
    "accuracy_fall": _set(reward_mean=0.1, accuracy_tried=0.1),
    "mismatch": _set(logprob_diff_mean=0.06),
    "mismatch_kl": _set(rollout_k3_kl=0.02),
    "mismatch_growth": _set(logprob_diff_mean=0.055),
    "c_ref_drift": _set(drift__reference_mean=-2.5),
    "uniform_groups": _set(groups_uniform_fraction=1.0),
    "gradient_explosion": _times("grad_norm", 60.0),
    "skipped_steps": _one_bad_step,
    "failed_gradings": _set(grading_failed=12),
    "failed_functions": _set(function_failed_error=20),
    "server_deaths": _one_death,
    "servers_idle": _set(idle__servers=0.9),
    "trainer_idle": _set(idle__trainer=0.9),
    "straggler": _set(straggler__train=1.9),
}
# What else the same rows are a sign of.
BESIDE = {
    "no_end": {"truncated"},
    "mismatch": {"mismatch_growth"},
    "mismatch_growth": {"mismatch"},
}


def sick_run(name: str, *, onset: int = ONSET, end: int = STEPS) -> list[Row]:
    """A healthy run that has the disease of this alarm from `onset` to `end`."""
    rows = healthy_run()
    if name == "hacking_format":  # what it rises from
        for row in rows[: onset - 1]:
            row |= {"outcome/no_answer": 60, "outcome/wrong": max(0, 118 - 52 - row["outcome/correct"])}
    for row in rows[onset - 1 : end]:
        DISEASES[name](row)
    return rows
