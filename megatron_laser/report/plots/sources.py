"""Figure of each source of the data over a run's steps."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_laser.report.plots.style import (
    new_figure,
    raw_and_smooth,
    save,
    series_style,
    validation_points,
)
from megatron_laser.report.run_data import Run


def plot_sources(runs: list[Run], path: Path) -> Path | None:
    """Accuracy of each source, rollouts and validation, and F1 of its score below, one column a run; None where no run
    has several sources."""
    runs = [run for run in runs if run.sources]
    if not runs:
        return None
    names = sorted({source for run in runs for source in run.sources})
    rows = [("share of right responses", "accuracy")]
    if any(len(run.series(f"source/{name}/self_reward_f1")[0]) for run in runs for name in names):
        rows.append(("self-reward F1", "self_reward_f1"))
    width, height = max(9.6, 5.2 * len(runs)), 1.2 + 3.4 * len(rows)
    figure, grid = new_figure(len(rows), len(runs), width=width, height=height, sharex="col", sharey="row")
    for column, run in enumerate(runs):
        for line, (label, metric) in enumerate(rows):
            axes = grid[line, column]
            for source in run.sources:
                style = series_style(names.index(source))
                name = run.source_accuracy(source) if metric == "accuracy" else f"source/{source}/{metric}"
                raw_and_smooth(axes, *run.series(name), source, style)
                evaluated = run.evaluation_series(f"source/{source}/{metric}")
                if len(evaluated[0]):
                    validation_points(axes, *evaluated, style)
            axes.margins(x=0.01)
            if not axes.lines:
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
            if column == 0:
                axes.set_ylabel(label)
        grid[0, column].set_title(run.label)
        grid[-1, column].set_xlabel("step")
        handles, labels = grid[0, column].get_legend_handles_labels()
        if any(len(run.evaluation_series(f"source/{source}/accuracy")[0]) for source in run.sources):
            handles += grid[0, column].plot([], [], marker="o", linestyle="none", color="#777777")
            labels.append("validation")
        if handles:
            grid[0, column].legend(handles, labels, loc="best")
    return save(
        figure,
        path,
        _finding(runs),
        "Line: rollouts, dropped groups too, running mean (faint: each step). Dots: validation.",
    )


def _finding(runs: list[Run]) -> str:
    """Of the first run the source that rose most and the one that rose least."""
    run = runs[0]
    rises = {}
    for source in run.sources:
        first, last = run.ends(run.source_accuracy(source))
        if math.isfinite(last):
            rises[source] = (last - first, f"{source} {first:.2f} → {last:.2f}")
    if not rises:
        return "Accuracy by source: not measured"
    most, least = max(rises, key=lambda name: rises[name][0]), min(rises, key=lambda name: rises[name][0])
    where = f" in {run.label}" if len(runs) > 1 else ""
    if most == least:
        return f"Accuracy by source{where}: {rises[most][1]}"
    return f"Accuracy by source{where}: most gained {rises[most][1]}, least {rises[least][1]}"
