"""What TensorBoard and wandb call the metrics of metrics.jsonl, in groups, and which of them they get by default.

Both make a section of what stands before the first slash. metrics.jsonl, the report and the alarms have the names as
they are documented (docs/metrics.md, whose table of groups is written from here).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class MetricGroup:
    """Metrics that stand together; `<...>` is a part of a name that varies.

    shown: those that are sent by default. more: the others, with `logging.all_metrics`.
    """

    name: str
    shown: tuple[str, ...]
    more: tuple[str, ...] = ()


GROUPS = (
    MetricGroup(
        "reward",
        (
            "reward_mean",
            "accuracy_tried",
            "pass_at_<k>",
            "reward/<term>",
            "groups_uniform_fraction",
            "grading_failed",
        ),
        ("reward_std", "outcome/<outcome>", "function_failed_<kind>"),
    ),
    MetricGroup(
        "policy",
        (
            *("policy_loss", "entropy", "approx_kl", "reference_kl", "clip_fraction", "grad_norm", "lr"),
            *("bad_steps", "logprob_diff_mean", "rollout_k3_kl", "importance_masked_fraction"),
            *("expert_load_max", "experts_idle", "router_aux_loss"),
        ),
        (
            *("total_loss", "kl_loss", "logprob_diff_max", "expert_load_min", "expert_load_entropy"),
            *("router_z_loss", "routing_replayed", "routing_changed"),
        ),
    ),
    MetricGroup(
        "laser",
        (
            *(
                "self_reward_loss",
                "self_reward_f1",
                "self_reward_auroc",
                "self_reward_ece",
                "zc_logprob_mean",
            ),
            *("score_right_mean", "score_wrong_mean", "advantage_mixed_fraction", "drift/shift"),
            *("readout/<readout>/loss", "readout/<readout>/auroc"),
        ),
        (
            *("self_reward_error", "self_reward_accuracy", "self_reward_accuracy_correct"),
            *(
                "self_reward_accuracy_incorrect",
                "self_reward_brier",
                "zc_logprob_max",
                "zc_logprob_diff_mean",
            ),
            *("zc_logprob_diff_max", "score_right_std", "score_wrong_std", "drift/<drift>"),
            "readout/<readout>/<metric>",
        ),
    ),
    MetricGroup(
        "rollout",
        (
            *("epoch", "response_length_mean", "truncated_fraction", "scored_fraction", "groups_dropped"),
            *("staleness_mean", "environment_tokens_fraction", "rollout/servers_healthy"),
            "rollout/prefix_cached_fraction",
        ),
        (
            *("tokens", "prompts_tried", "groups_dropped_right", "groups_dropped_wrong", "groups_missing"),
            *("groups_carried", "staleness_max", "rollout/<metric>"),
        ),
    ),
    MetricGroup(
        "eval",
        (
            *("eval/accuracy", "eval/pass", "eval/majority", "eval/weighted_majority", "eval/best_of"),
            *("eval/self_reward_f1", "eval/self_reward_auroc", "eval/response_length_mean"),
            *("eval/truncated_fraction", "eval/source/<source>/accuracy"),
        ),
        ("eval/<metric>",),
    ),
    MetricGroup("test", ("test/accuracy", "test/weighted_majority"), ("test/<metric>",)),
    MetricGroup("source", ("source/<source>/reward_mean",), ("source/<source>/<metric>",)),
    MetricGroup(
        "time",
        (
            *("time/total", "time/generate", "time/logprob", "time/train", "time/sync", "time/evaluate"),
            *("time/checkpoint", "time/tokens_per_second"),
        ),
        ("time/<phase>", "straggler/<phase>"),
    ),
    MetricGroup(
        "speed",
        (
            *("rate/tokens_per_second_gpu", "mfu/train", "mfu/generate", "idle/trainer", "idle/servers"),
            *("plan/step_ratio", "rank_imbalance"),
        ),
        (
            *("micro_batches", "pipeline_bubble", "rate/<metric>", "mfu/<metric>", "idle/<metric>"),
            "plan/<metric>",
        ),
    ),
    MetricGroup(
        "servers",
        ("servers/utilisation", "servers/queued_mean", "servers/kv_usage_mean"),
        ("servers/<metric>",),
    ),
    MetricGroup("memory", ("memory/peak_device_gib",), ("memory/peak_rss_gib",)),
)


def dashboard_metrics(line: Mapping[str, Any], *, every: bool) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, but `step`, under the names that TensorBoard and wandb show.

    A name that is in no group keeps it and is sent.

    Args:
        every: those of `MetricGroup.more`, too.
    """
    found = {}
    for name, value in line.items():
        if name != "step" and isinstance(value, (int, float)):
            group, shown = placed(name)
            if shown or every:
                found[_within(group, name)] = value
    return found


@cache
def placed(name: str) -> tuple[str, bool]:
    """(group, whether it is sent by default) of a metric; ("", True) for one that is in no group."""
    for pattern, group, shown in _patterns():
        if pattern.fullmatch(name):
            return group, shown
    return "", True


def group_table() -> str:
    """The groups as a table of docs/metrics.md."""
    lines = ["| group | by default | with `logging.all_metrics: true` |", "| --- | --- | --- |"]
    for group in GROUPS:
        cells = (", ".join(f"`{name}`" for name in names) or "no more" for names in (group.shown, group.more))
        lines.append(f"| **{group.name}/** | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _within(group: str, name: str) -> str:
    return name if not group or name.startswith(f"{group}/") else f"{group}/{name}"


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str, bool], ...]:
    """Of all groups, those that are sent by default first: they are the narrower ones."""
    return tuple(
        (_pattern(name), group.name, shown)
        for shown in (True, False)
        for group in GROUPS
        for name in (group.shown if shown else group.more)
    )


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile("".join(_pieces(name)))


def _pieces(name: str) -> Iterator[str]:
    for index, piece in enumerate(re.split(r"<(\w+)>", name)):
        if index % 2 == 0:
            yield re.escape(piece)
        else:
            yield {"k": r"\d+", "metric": ".+"}.get(piece, "[^/]+")
