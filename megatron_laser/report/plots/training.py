"""Figures over a run's steps: accuracy, self-reward, scores, and where the time goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_laser.report.plots.style import (
    RIGHT,
    WRONG,
    FloatArray,
    new_figure,
    no_data,
    raw_and_smooth,
    run_styles,
    save,
    smooth,
    validation_points,
)
from megatron_laser.report.run_data import Run

_CLASSES = {"right": RIGHT, "wrong": WRONG}
_PHASE_COLOURS = {
    "generate": "#0072B2",
    "grade": "#F0E442",
    "logprob": "#CC79A7",
    "train": "#009E73",
    "sync": "#56B4E9",
    "evaluate": "#999999",
    "other": "#DDDDDD",
}


def plot_learning(runs: list[Run], path: Path) -> Path:
    """Accuracy of rollouts (raw and smoothed) and on validation, over steps."""
    figure, grid = new_figure()
    axes = grid[0, 0]
    styles = run_styles(runs)
    for run in runs:
        steps, values = run.series(run.accuracy)
        raw_and_smooth(axes, steps, values, run.label, styles[run.label])
        validation_points(axes, *run.evaluation_series("accuracy"), styles[run.label])
    axes.set(xlabel="step", ylabel="share of right responses")
    axes.margins(x=0.01)
    _mark_warm_up(axes, runs, at_top=False)
    _legend(axes, runs, "accuracy")
    return save(
        figure,
        path,
        "Accuracy while training: " + _starts_and_ends(runs),
        "Line: rollouts, dropped groups too, running mean (faint: each step). Dots: validation. Both should rise.",
    )


def plot_self_reward(runs: list[Run], path: Path) -> Path | None:
    """Self-reward F1 and AUROC over steps; None where neither was measured."""
    if not any(_measured(runs, name) for name in ("self_reward_f1", "self_reward_auroc")):
        return None
    figure, grid = new_figure(1, 2, width=11.5)
    styles = run_styles(runs)
    for axes, name, title in (
        (grid[0, 0], "self_reward_f1", "F1 (threshold 0.5)"),
        (grid[0, 1], "self_reward_auroc", "AUROC (any threshold)"),
    ):
        for run in runs:
            raw_and_smooth(axes, *run.series(name), run.label, styles[run.label])
            validation_points(axes, *run.evaluation_series(name), styles[run.label])
        axes.set(xlabel="step", title=title, ylim=(-0.02, 1.02))
        axes.margins(x=0.01)
        if name == "self_reward_auroc":
            axes.axhline(0.5, color="black", linewidth=1, linestyle=":")
            axes.annotate("chance", (1, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        _mark_warm_up(axes, runs, at_top=True)
        if not _measured(runs, name):
            no_data(axes, "never defined: all responses of a step were right, or all wrong")
    _legend(grid[0, 0], runs, "self_reward_f1")
    return save(
        figure,
        path,
        "Does the score tell right from wrong? F1: " + _starts_and_ends(runs, "self_reward_f1"),
        "Should rise with LaSeR; GRPO's score is not trained. Line: rollouts, dots: validation.",
    )


def plot_scores(runs: list[Run], path: Path) -> Path | None:
    """Median and bands of the scores of right and wrong responses over steps, one panel a run that has them."""
    runs = [run for run in runs if any(len(_quantiles(run, name)[0]) for name in _CLASSES)]
    if not runs:
        return None
    figure, grid = new_figure(1, len(runs), width=max(9.6, 5.2 * len(runs)), sharex=True, sharey=True)
    shown: list[float] = []
    for axes, run in zip(grid[0], runs):
        for name, colour in _CLASSES.items():
            steps, quantiles = _quantiles(run, name)
            if len(steps):
                shown += _bands(axes, steps, quantiles, name, colour)
        for target in (0.0, 1.0):
            axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
        axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=run.label, xlabel="step")
        axes.margins(x=0.01)
        axes.legend(loc="upper left")
    grid[0, 0].set_ylabel("score $r_s$")
    low, high = np.quantile(shown, [0.01, 0.99])
    grid[0, 0].set_ylim(min(-0.15, float(low) - 0.1), max(1.25, float(high) + 0.1))
    return save(
        figure,
        path,
        "Scores of right and wrong responses should part: " + _gaps(runs),
        "Line: median; bands: middle 50 % and 90 %. Dashed: targets 1 and 0. Dotted: decision at 0.5.",
    )


def plot_time(runs: list[Run], path: Path) -> Path | None:
    """Mean seconds per step of each phase, one bar a run that has timings; None without any."""
    runs = [run for run in runs if time_split(run)]
    if not runs:
        return None
    figure, grid = new_figure(height=1.9 + 0.75 * len(runs))
    axes = grid[0, 0]
    totals: list[float] = []
    seen: list[str] = []
    for position, run in enumerate(runs):
        split = time_split(run)
        totals.append(sum(split.values()))
        left = 0.0
        for phase, seconds in split.items():
            label = phase if phase not in seen else None
            seen += [phase]
            colour = _PHASE_COLOURS.get(phase, "#BBBBBB")
            axes.barh(position, seconds, left=left, color=colour, edgecolor="white", label=label, height=0.62)
            if seconds > 0.06 * max(totals):
                dark = phase in ("generate", "train")
                axes.text(
                    left + seconds / 2,
                    position,
                    f"{seconds:.2g} s",
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                    fontsize=9,
                )
            left += seconds
    axes.set_yticks(range(len(runs)), [run.label for run in runs])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds per step (mean)")
    axes.legend(ncols=len(set(seen)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    texts = [f"{run.label} {total:.2g} s a step" for run, total in zip(runs, totals)]
    return save(
        figure,
        path,
        "Where the time goes: " + ", ".join(texts),
        "LaSeR's extra over GRPO should be small: one more label in the same pass.",
    )


def time_split(run: Run) -> dict[str, float]:
    """Mean seconds per step: phases, the rest of `total` as `other`, and evaluation, which is outside."""
    phases = run.phases()
    total = phases.pop("total", 0.0)
    evaluate = phases.pop("evaluate", 0.0)
    order = [name for name in _PHASE_COLOURS if name in phases]
    order += [name for name in phases if name not in order]
    split = {name: phases[name] for name in order}
    other = total - sum(split.values())
    if other > 0.005 * total:
        split["other"] = other
    if evaluate > 0:
        split["evaluate"] = evaluate
    return split


def _measured(runs: list[Run], name: str) -> bool:
    return any(len(run.series(name)[0]) or len(run.evaluation_series(name)[0]) for run in runs)


def _quantiles(run: Run, responses: str) -> tuple[FloatArray, FloatArray]:
    """Steps and [steps, 5] quantiles of the scores of `right` or `wrong` responses, where all five are known."""
    name = f"score_quantiles_{responses}"
    rows = [
        (row["step"], row[name])
        for row in run.training_rows
        if isinstance(row.get(name), list) and len(row[name]) == 5 and None not in row[name]
    ]
    return np.array([step for step, _ in rows], float), np.array([values for _, values in rows], float)


def _bands(axes: Axes, steps: FloatArray, quantiles: FloatArray, name: str, colour: str) -> list[float]:
    p5, p25, p50, p75, p95 = (smooth(column) for column in quantiles.T)
    axes.fill_between(steps, p5, p95, color=colour, alpha=0.13, linewidth=0)
    axes.fill_between(steps, p25, p75, color=colour, alpha=0.3, linewidth=0)
    axes.plot(steps, p50, color=colour, label=name, linestyle="-" if name == "right" else "--")
    return [*p5.tolist(), *p95.tolist()]


def _mark_warm_up(axes: Axes, runs: list[Run], *, at_top: bool) -> None:
    """Where LaSeR's loss and mixing begin, when that is inside the run; labelled where there are no curves."""
    for run in runs:
        if run.kind != "LaSeR":
            continue
        first, second = run.first_steps()
        for begins, text in ((first, "self-reward loss on"), (second, "advantages mixed")):
            step = 0 if begins is None else begins - 1
            if 0 < step < run.steps:
                axes.axvline(step + 0.5, color="#777777", linewidth=1, linestyle=(0, (2, 3)))
                axes.annotate(
                    text,
                    (step + 0.5, 0.98 if at_top else 0.02),
                    xycoords=("data", "axes fraction"),
                    rotation=90,
                    ha="right",
                    va="top" if at_top else "bottom",
                    fontsize=8,
                    color="#555555",
                )
        return


def _legend(axes: Axes, runs: list[Run], evaluated: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    for run in runs:  # a run that has no line, but points
        if run.label not in labels and len(run.evaluation_series(evaluated)[0]):
            colour = run_styles(runs)[run.label]["color"]
            handles += axes.plot([], [], marker="o", linestyle="none", color=colour)
            labels.append(run.label)
    if any(len(run.evaluation_series(evaluated)[0]) for run in runs):
        handles += axes.plot([], [], marker="o", linestyle="none", color="#777777")
        labels.append("validation")
    if handles:
        axes.legend(handles, labels, loc="best")


def _starts_and_ends(runs: list[Run], name: str | None = None) -> str:
    """Of each run; `name` None: its accuracy while training."""
    texts: list[str] = []
    for run in runs:
        first, last = run.ends(name or run.accuracy)
        if math.isfinite(last):
            texts.append(f"{run.label} {first:.2f} → {last:.2f}")
    return ", ".join(texts) or "not measured"


def _gaps(runs: list[Run]) -> str:
    texts: list[str] = []
    for run in runs:
        medians: dict[str, Any] = {}
        for name in _CLASSES:
            steps, quantiles = _quantiles(run, name)
            if len(steps):
                medians[name] = float(quantiles[-max(1, len(steps) // 10) :, 2].mean())
        if len(medians) == 2:
            texts.append(f"{run.label} {medians['right']:.2f} against {medians['wrong']:.2f}")
    return ", ".join(texts) or "not measured"
