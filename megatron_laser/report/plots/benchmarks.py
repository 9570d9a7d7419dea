"""Figures of one benchmark: accuracy against k for every vote, and the score's histograms and reliability."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from megatron_laser.report.plots.evaluation import reliability_curve, score_histogram
from megatron_laser.report.plots.style import FloatArray, new_figure, save

_SCORE = "#0072B2"
# way, label, colour, line, marker, whether its interval is drawn; of many bands only the compared ones are
_WAYS = (
    ("pass", "pass@k (any is right)", "#999999", (0, (1, 1.2)), "", False),
    ("weighted_majority", "majority, weighted by the score", _SCORE, "-", "o", True),
    ("best_of", "best of k by the score", "#009E73", "-.", "^", False),
    ("logprob_majority", "majority, weighted by mean log-prob", "#CC79A7", "--", "D", False),
    ("majority", "majority", "#D55E00", "--", "s", True),
    ("best_by_logprob", "best of k by mean log-prob", "#8C6D1F", "-.", "v", False),
    ("average", "one response (average)", "#444444", ":", "", False),
)


def plot_accuracy_against_k(name: str, detail: dict[str, Any], path: Path) -> Path | None:
    """Every way of choosing among k responses, with 95 % bands for the two majorities; None where K is 1.

    Args:
        detail: see `evaluation.evaluation_detail`.
    """
    curves = detail["curves"]
    max_k = len(curves["average"]["mean"])
    if max_k < 2:
        return None
    figure, grid = new_figure(1, 1, width=9.6, height=5.6)
    axes = grid[0, 0]
    ks = np.arange(1, max_k + 1)
    # the legend in the order of the lines' right ends
    shown = sorted((way for way in _WAYS if way[0] in curves), key=lambda way: -curves[way[0]]["mean"][-1])
    for way, label, colour, line, marker, band in shown:
        curve = curves[way]
        axes.plot(
            ks,
            curve["mean"],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=4.5,
            markevery=max(1, max_k // 16),
            label=f"{label}: {curve['mean'][-1]:.3f}",
        )
        if band:
            axes.fill_between(ks, curve["low"], curve["high"], color=colour, alpha=0.13, linewidth=0)
    if max_k > 8:
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.95, max_k * 1.05)
        axes.xaxis.set_major_locator(FixedLocator([k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= max_k]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
    else:
        axes.set_xticks(ks)
    axes.set(xlabel="k responses to each problem", ylabel="share of problems answered right")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title=f"with k = {max_k}")
    return save(
        figure,
        path,
        _votes_finding(name, detail),
        "Bands: 95 % bootstrap over problems, for the two majorities.",
    )


def plot_scores(
    name: str, scores: FloatArray, right: NDArray[np.bool_], detail: dict[str, Any], path: Path
) -> Path | None:
    """Histograms of the scores of right and wrong responses, and the reliability diagram; None without scores.

    Args:
        scores, right: [responses that have a score].
    """
    if not len(scores):
        return None
    figure, grid = new_figure(1, 2, width=10.4, height=4.8)
    score_histogram(grid[0, 0], scores, right)
    grid[0, 0].set_title(f"{right.sum()} right, {(~right).sum()} wrong responses")
    axes: Axes = grid[0, 1]
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":")
    reliability_curve(axes, scores.clip(0, 1), right, "", {"color": _SCORE, "linestyle": "-"}, 0)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="score, clamped to [0, 1]")
    axes.set(ylabel="share that is right", title=f"reliability: ECE {_value(detail, 'ece')}")
    return save(
        figure,
        path,
        f"{name}: AUROC of the score {_value(detail, 'auroc')}, F1 {_value(detail, 'f1')} (95 % intervals)",
        "Left: the histograms should lie apart. Right: on the diagonal the score is a probability; dots by share of "
        "responses.",
    )


def _votes_finding(name: str, detail: dict[str, Any]) -> str:
    difference = detail["differences"].get("weighted_minus_majority")
    k = len(detail["curves"]["average"]["mean"])
    if detail["no_votes"]:
        return f"{name}: choosing among {k} responses; votes are not available"
    if difference is None:
        curve = detail["curves"]["majority"]
        mean, low, high = (curve[part][-1] for part in ("mean", "low", "high"))
        return f"{name}: majority of {k} answers {mean:.3f} [{low:.3f}, {high:.3f}] right"
    mean, low, high = (difference[part][-1] for part in ("mean", "low", "high"))
    return (
        f"{name}: weighting by the score changes the majority of {k} by {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    )


def _value(detail: dict[str, Any], metric: str) -> str:
    value, low, high = (detail["verification"]["all"][metric][part] for part in ("value", "low", "high"))
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")
