"""Figure of a run's readouts: does each tell right from wrong, what does it still lose, and where in a response."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_laser.report.plots.style import new_figure, no_data, raw_and_smooth, save, series_style
from megatron_laser.report.readout_table import SCORE_LABEL, quarter_aurocs, readout_metric
from megatron_laser.report.run_data import Run

_QUARTERS = ("1st", "2nd", "3rd", "4th")


def plot_readouts(runs: list[Run], path: Path) -> Path | None:
    """AUROC and loss over steps, and AUROC along responses for scores of prefixes, one row a run; None where no run has
    a further readout."""
    runs = [run for run in runs if run.further_readouts]
    if not runs:
        return None
    prefixes = any(quarter_aurocs(run, name) for run in runs for name in run.further_readouts)
    columns = 3 if prefixes else 2
    figure, grid = new_figure(len(runs), columns, width=4.6 * columns + 0.6, height=1.2 + 3.6 * len(runs))
    for line, run in enumerate(runs):
        named = {SCORE_LABEL: None, **{name: name for name in run.further_readouts}}
        styles = {label: series_style(index) for index, label in enumerate(named)}
        for axes, metric in zip(grid[line], ("auroc", "loss")):
            for label, name in named.items():
                raw_and_smooth(axes, *run.series(readout_metric(name, metric)), label, styles[label])
            axes.margins(x=0.01)
            if not axes.lines:
                no_data(axes, "not measured")
        grid[line, 0].set(ylabel="AUROC", ylim=(-0.02, 1.02))
        _chance(grid[line, 0])
        # Losses of different kinds lie orders of magnitude apart.
        losses = [values for item in grid[line, 1].lines for values in item.get_ydata()]
        if losses and min(losses) > 0 and max(losses) > 30 * min(losses):
            grid[line, 1].set_yscale("log")
        grid[line, 1].set_ylabel("loss, without its weight")
        if prefixes:
            _along(grid[line, 2], run, styles)
        grid[line, 0].set_title(run.label)
        handles, labels = grid[line, 0].get_legend_handles_labels()
        if handles:
            grid[line, 0].legend(handles, labels, loc="best")
    for axes in grid[-1, :2]:
        axes.set_xlabel("step")
    if prefixes:
        grid[-1, 2].set_xlabel("quarter of the response")
    return save(
        figure,
        path,
        "Do the readouts tell right from wrong? AUROC: " + _finding(runs),
        "Rollouts, running mean (faint: each step). Right: scores of prefixes along responses, last tenth of the steps."
        if prefixes
        else "Rollouts, running mean (faint: each step).",
    )


def _along(axes: Axes, run: Run, styles: dict[str, dict[str, Any]]) -> None:
    for name in run.further_readouts:
        values = np.array(quarter_aurocs(run, name))
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            axes.plot(known, values[known], marker="o", label=name, **styles[name])
    axes.set(ylim=(-0.02, 1.02), xlim=(-0.3, 3.3))
    axes.set_xticks(range(4), _QUARTERS)
    axes.set_ylabel("AUROC")
    if axes.lines:
        _chance(axes)
    else:
        no_data(axes, "no scores of prefixes")


def _chance(axes: Axes) -> None:
    axes.axhline(0.5, color="black", linewidth=1, linestyle=":")
    axes.annotate("chance", (1, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom")


def _finding(runs: list[Run]) -> str:
    """Of the first run: each further readout's, first and last; three of them at most."""
    texts = []
    for name in runs[0].further_readouts:
        first, last = runs[0].ends(readout_metric(name, "auroc"))
        if math.isfinite(last):
            texts.append(f"{name} {first:.2f} → {last:.2f}")
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    where = f" in {runs[0].label}" if len(runs) > 1 else ""
    return ", ".join(texts[:3]) + more + where if texts else "not measured"
