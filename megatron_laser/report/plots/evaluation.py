"""Figures of the last evaluation: calibration of the score, and votes against the number of responses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from megatron_laser.report.plots.style import RIGHT, WRONG, FloatArray, new_figure, run_styles, save
from megatron_laser.report.run_data import Evaluation, Run

_BINS = 10
_WAYS = (
    ("weighted_majority", "weighted majority", "#0072B2", "-", "o"),
    ("majority", "majority", "#D55E00", "--", "s"),
    ("best_of", "best of k by score", "#009E73", "-.", "^"),
    ("average", "one response (average)", "#777777", ":", ""),
)


def plot_calibration(runs: list[Run], path: Path) -> Path | None:
    """Reliability diagram, and histograms of the scores of right and wrong responses; None without scores."""
    scored = [(run, run.final) for run in runs if run.final is not None and len(run.final.scores()[0])]
    if not scored:
        return None
    figure, grid = new_figure(1, 1 + len(scored), width=4.8 + 4.2 * len(scored), height=4.8)
    reliability = grid[0, 0]
    styles = run_styles(runs)
    texts: list[str] = []
    for index, (run, evaluation) in enumerate(scored):
        scores, right = evaluation.scores()
        reliability_curve(reliability, scores.clip(0, 1), right, run.label, styles[run.label], index)
        axes = grid[0, 1 + index]
        score_histogram(axes, scores, right)
        axes.set_title(f"{_place(run, evaluation)}: {right.sum()} right, {(~right).sum()} wrong")
        axes.sharex(grid[0, 1])
        texts.append(f"{run.label} ECE {evaluation.number('self_reward_ece'):.2f}")
    reliability.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":")
    reliability.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="score, clamped to [0, 1]")
    reliability.set(ylabel="share that is right", title="Reliability")
    reliability.legend(loc="upper left")
    return save(
        figure,
        path,
        f"Is the score a probability? {', '.join(texts)}",
        "Left: dots on the diagonal mean calibrated (95 % intervals; ten bins). "
        "Right: the two histograms should lie apart.",
    )


def plot_votes(runs: list[Run], path: Path) -> Path | None:
    """Accuracy of each way of choosing among k responses; None where no evaluation has several."""
    voted = [(run, run.final) for run in runs if run.final is not None and run.final.max_k > 1]
    if not voted:
        return None
    figure, grid = new_figure(1, len(voted), width=max(9.6, 5.4 * len(voted)), height=5.2, sharey=True)
    texts: list[str] = []
    for axes, (run, evaluation) in zip(grid[0], voted):
        for way, label, colour, line, marker in _WAYS:
            curve = evaluation.curve(way)
            if len(curve):
                ks = np.arange(1, len(curve) + 1)
                text = f"{label}: {curve[-1]:.3f}"
                axes.plot(ks, curve, color=colour, linestyle=line, marker=marker, markersize=5, label=text)
        axes.set(title=_place(run, evaluation), xlabel="k responses to each problem")
        ticks = range(1, evaluation.max_k + 1) if evaluation.max_k <= 12 else None
        if ticks is not None:
            axes.set_xticks(ticks)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=2,
            title=f"with k = {evaluation.max_k}",
        )
        gain, low, high = (
            evaluation.number("weighted_minus_majority" + part) for part in ("", "_low", "_high")
        )
        if math.isfinite(gain):
            texts.append(f"{run.label} {gain:+.3f} [{low:+.3f}, {high:+.3f}]")
    grid[0, 0].set_ylabel("share of problems answered right")
    finding = "Weighted minus plain majority: " + ", ".join(texts) if texts else "Choosing among k responses"
    return save(
        figure,
        path,
        finding,
        "A score worth having lifts the weighted vote above the plain one, and best-of above the average.",
    )


def reliability_curve(
    axes: Axes,
    scores: FloatArray,
    right: NDArray[np.bool_],
    label: str,
    style: dict[str, Any],
    index: int,
) -> None:
    """Share right against mean score in ten bins, with 95 % intervals; larger dots hold more responses."""
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    filled = np.unique(bins)
    counts = np.array([np.sum(bins == b) for b in filled])
    means = np.array([scores[bins == b].mean() for b in filled])
    shares = np.array([right[bins == b].mean() for b in filled])
    low, high = _wilson(shares, counts)
    marker = "os^D"[index % 4]
    axes.plot(means, shares, label=label, linewidth=1.2, marker=marker, markersize=4, **style)
    errors = [np.maximum(0, shares - low), np.maximum(0, high - shares)]
    axes.errorbar(means, shares, yerr=errors, fmt="none", ecolor=style["color"], alpha=0.6)
    axes.scatter(
        means,
        shares,
        s=20 + 180 * counts / counts.sum(),
        color=style["color"],
        marker=marker,
        edgecolors="white",
        zorder=3,
    )


def _wilson(shares: FloatArray, counts: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    denominator = 1 + z**2 / counts
    centre = (shares + z**2 / (2 * counts)) / denominator
    half = z * np.sqrt(shares * (1 - shares) / counts + z**2 / (4 * counts**2)) / denominator
    return centre - half, centre + half


def score_histogram(axes: Axes, scores: FloatArray, right: NDArray[np.bool_]) -> None:
    """Each class to its own 100 %, so that a rare class is seen; outliers in the outermost bars."""
    low, high = np.quantile(scores, [0.005, 0.995])
    edges = np.linspace(min(-0.1, float(low)), max(1.1, float(high)), 41)
    clipped = scores.clip(edges[0], edges[-1])
    for mask, name, colour in ((right, "right", RIGHT), (~right, "wrong", WRONG)):
        if mask.any():
            shares = np.histogram(clipped[mask], edges)[0] / mask.sum()
            axes.stairs(shares, edges, color=colour, alpha=0.45, fill=True, label=name)
            axes.stairs(shares, edges, color=colour, linewidth=1.3)
    axes.axvline(0.5, color="black", linewidth=0.9, linestyle=":")
    axes.set(xlabel="score $r_s$", ylabel="share of its class")
    axes.legend(loc="best")


def _place(run: Run, evaluation: Evaluation) -> str:
    return f"{run.label} ({evaluation.split}, step {evaluation.step})"
