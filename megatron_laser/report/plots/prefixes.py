"""Figure of scores of prefixes: AUROC by place, and what ending below a threshold saves and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_laser.report.plots.style import new_figure, save

_PREFIX, _END = "#0072B2", "#444444"
# way, label, colour, line, marker
_WAYS = (
    ("weighted_majority", "weighted majority", "#0072B2", "-", "o"),
    ("majority", "majority", "#D55E00", "--", "s"),
    ("accuracy", "one response (average)", "#444444", ":", "D"),
)


def plot_prefixes(name: str, prefix: Mapping[str, Any], path: Path) -> Path | None:
    """Left AUROC by place with 95 % intervals, right accuracy against tokens saved; None without a prefix.

    Args:
        prefix: see `evaluation.prefix_summary.prefix_detail`, as JSON has it.
    """
    rows = [row for row in prefix["by_position"] if row["auroc"] is not None]
    if not rows:
        return None
    figure, grid = new_figure(1, 2, width=11.4, height=4.9)
    _draw_auroc(grid[0, 0], rows, prefix)
    _draw_savings(grid[0, 1], prefix["stop_below"])
    first, end = rows[0], prefix["end"]["auroc"]
    place = "first places" if first["first"] != first["last"] else f"place {first['first']}"
    finding = f"{name}: AUROC {first['auroc']:.2f} at {place}, {rows[-1]['auroc']:.2f} at the last"
    if end is not None and math.isfinite(end):
        finding += f", {end:.2f} at the end"
    return save(
        figure,
        path,
        finding,
        "Left: how early the score knows (95 % bootstrap over problems). Right: what ending low prefixes saves, and "
        "costs; numbers are thresholds.",
    )


def _draw_auroc(axes: Axes, rows: Sequence[Mapping[str, Any]], prefix: Mapping[str, Any]) -> None:
    places = np.array([row["first"] / 2 + row["last"] / 2 for row in rows])
    values = np.array([row["auroc"] for row in rows])
    spans = [
        [0.0 if row[bound] is None else abs(row[bound] - row["auroc"]) for row in rows]
        for bound in ("low", "high")
    ]
    axes.errorbar(
        places, values, yerr=spans, color=_PREFIX, marker="o", capsize=3, label="score of the prefix"
    )
    same = [(place, row["end_auroc"]) for place, row in zip(places, rows, strict=True)]
    same = [(place, value) for place, value in same if value is not None]
    if same:
        axes.plot(
            *zip(*same, strict=True),
            color=_END,
            linestyle="--",
            marker="s",
            markersize=4.5,
            label="score of the end, same responses",
        )
    axes.axhline(0.5, color="black", linewidth=1, linestyle=":")
    read = [row[name] for row in rows for name in ("auroc", "low") if row[name] is not None]
    lowest = min([0.4, *read, *(value for _, value in same)])
    most = max(row["responses"] for row in rows)
    for place, row in zip(places, rows, strict=True):
        share = row["responses"] / most
        axes.annotate(f"{share:.0%}", (place, lowest + 0.02), ha="center", fontsize=8, color=_END)
    axes.set(ylim=(lowest, 1.02), ylabel="AUROC: right against wrong responses")
    axes.set_xlabel(
        "occurrence of the delimiter" if "delimiter" in prefix["rule"] else "tokens of the response"
    )
    axes.set_title("percentages: responses that go on there")
    pad = max(1.0, 0.08 * float(places[-1] - places[0]))
    axes.set_xlim(places[0] - pad, places[-1] + pad)
    if len(places) <= 10:
        axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.legend(loc="best")


def _draw_savings(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    saved = [100 * (row["tokens_saved"] or 0.0) for row in rows]
    for way, label, colour, line, marker in _WAYS:
        if way not in rows[0]:
            continue
        values = [row[way]["value"] for row in rows]
        axes.plot(saved, values, color=colour, linestyle=line, marker=marker, markersize=5, label=label)
        if way == "accuracy":
            for row, x, y in zip(rows, saved, values, strict=True):
                if row["threshold"] is not None:
                    axes.annotate(
                        f"{row['threshold']:g}",
                        (x, y),
                        (0, -13),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                    )
    axes.set(xlabel="response tokens saved, %", ylabel="share right")
    axes.margins(x=0.06, y=0.16)
    axes.set_title("ended responses count as wrong and have no vote")
    axes.legend(loc="best")
