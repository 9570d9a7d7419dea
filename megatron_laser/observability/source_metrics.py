"""A step's metrics of each source of the data, taken apart for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PREFIX = "source/"
_SPLITS = ("", "eval/", "test/")


def metrics_by_source(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Source -> its metrics, under their plain names: `reward_mean`, `eval/accuracy`; {} where there is one source."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        for split in _SPLITS:
            if name.startswith(split + _PREFIX):
                source, _, metric = name.removeprefix(split + _PREFIX).partition("/")
                found.setdefault(source, {})[split + metric] = value
    return {source: found[source] for source in sorted(found)}


def later_metrics(
    before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What is known of each source: a step's numbers replace those of an earlier one, evaluations stay until the next.

    A new object, since another thread may be drawing the one before.
    """
    found = {}
    for source in sorted({*before, *now}):
        new = now.get(source, {})
        # Where a source stands in its data is said in every step, also in one that had no response of it.
        trained = "reward_mean" in new
        old = before.get(source, {}).items()
        found[source] = {
            name: value for name, value in old if name.startswith(_SPLITS[1:]) or not trained
        } | new
    return found
