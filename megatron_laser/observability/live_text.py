"""Numbers of a run as short texts: plain log lines, durations, sparklines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

PHASES = ("generate", "grade", "logprob", "train", "sync")

# label, metric, format; in the order in which a person looks
LINE_FIELDS = (
    ("reward", "reward_mean", ".3f"),
    ("F1", "self_reward_f1", ".3f"),
    ("AUROC", "self_reward_auroc", ".3f"),
    ("policy", "policy_loss", ".4f"),
    ("self", "self_reward_loss", ".4f"),
    ("grad", "grad_norm", ".2f"),
    ("len", "response_length_mean", ".0f"),
)
EVALUATION_FIELDS = tuple(
    (prefix + label, f"{split}/{name}", ".3f")
    for split, prefix in (("eval", ""), ("test", "test "))
    for label, name in (
        ("accuracy", "accuracy"),
        ("F1", "self_reward_f1"),
        ("AUROC", "self_reward_auroc"),
        ("majority", "majority"),
        ("weighted", "weighted_majority"),
    )
)
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-:=+*#"


def number(metrics: Mapping[str, Any], name: str) -> float | None:
    """The metric as a finite float, or None where it is missing, null or NaN."""
    value = metrics.get(name)
    if value is None or isinstance(value, (str, list)) or not math.isfinite(float(value)):
        return None
    return float(value)


def format_fields(
    metrics: Mapping[str, Any], fields: Sequence[tuple[str, str, str]]
) -> list[tuple[str, str]]:
    """(label, text) of those fields that are there."""
    values = ((label, number(metrics, name), spec) for label, name, spec in fields)
    return [(label, format(value, spec)) for label, value, spec in values if value is not None]


def step_fields(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of one step's numbers; with dropped groups also the accuracy over everything that was graded.

    Responses that could not be graded are counted where there are any.
    """
    fields = format_fields(metrics, LINE_FIELDS)
    tried = number(metrics, "accuracy_tried")
    if tried is not None and number(metrics, "groups_dropped"):
        right, wrong = (number(metrics, f"groups_dropped_{name}") or 0 for name in ("right", "wrong"))
        fields.insert(
            1, ("of all tried", f"{tried:.3f} (dropped {right:.0f} all right, {wrong:.0f} all wrong)")
        )
    failed = number(metrics, "grading_failed")
    if failed:
        fields.append(("not graded", f"{failed:.0f}"))
    return fields


def plain_line(step: int, total_steps: int, metrics: Mapping[str, Any]) -> str:
    """One step as one line of a log."""
    width = len(str(total_steps))
    parts = [f"step {step:>{width}}/{total_steps}"]
    parts += [f"{label} {text}" for label, text in step_fields(metrics)]
    rate = number(metrics, "time/tokens_per_second")
    if rate is not None:
        parts.append(f"{format_count(rate)} tok/s")
    total = number(metrics, "time/total")
    if total is not None:
        split = [f"{name} {share:.0%}" for name, share in time_shares(metrics) if share >= 0.05]
        scores = number(metrics, "rollout/score_time_fraction")
        if scores:
            split.append(f"scores {scores:.1%} of the requests' time")
        parts.append(f"{total:.2f} s" + (f" ({', '.join(split)})" if split else ""))
    evaluation = format_fields(metrics, EVALUATION_FIELDS)
    if evaluation:
        parts.append("| eval " + " ".join(f"{label} {text}" for label, text in evaluation))
    return "  ".join(parts)


def time_shares(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Each phase's share of the phases' sum."""
    seconds = [(phase, number(metrics, f"time/{phase}") or 0.0) for phase in PHASES]
    total = sum(value for _, value in seconds)
    return [(phase, value / total) for phase, value in seconds] if total > 0 else []


def format_duration(seconds: float) -> str:
    """42s, 3m12s, 2h05m or 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(value: float) -> str:
    """842, 12.3k, 4.56M."""
    if abs(value) < 1e3:
        return f"{value:.0f}"
    return f"{value / 1e3:.1f}k" if abs(value) < 1e6 else f"{value / 1e6:.2f}M"


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """At most `width` characters, each the mean of its share of `values`, from lowest to highest."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    if high - low < 1e-12:
        return blocks[0] * count
    return "".join(blocks[round((mean - low) / (high - low) * (len(blocks) - 1))] for mean in means)
