"""Figure of what the policy does over a run's steps: pass@k, length, entropy, KL, gradient norm and learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_laser.report.plots.style import (
    new_figure,
    raw_and_smooth,
    run_styles,
    save,
    smooth,
    validation_points,
)
from megatron_laser.report.run_data import Run

_PASS = re.compile(r"pass_at_(\d+)")
# The first of them that is not always 0, as that of updates is with one for each batch.
_KL = (
    ("reference_kl", "KL to the reference model"),
    ("approx_kl", "KL of each update (k3)"),
    ("rollout_k3_kl", "KL of engine and trainer (k3)"),
)


def plot_policy(runs: list[Run], path: Path) -> Path | None:
    """Six panels over steps, of which those without a number are left out; None where all are."""
    kl = next((pair for pair in _KL if any(run.series(pair[0])[1].any() for run in runs)), _KL[0])
    panels: list[tuple[str, str, Callable[[Axes], None]]] = [
        ("response_length_mean", "Length of responses, tokens", lambda axes: _length(axes, runs)),
        ("entropy", "Entropy, nats a token", lambda axes: _lines(axes, runs, "entropy")),
        (kl[0], f"{kl[1]}, nats a token", lambda axes: _lines(axes, runs, kl[0])),
        ("grad_norm", "Gradient norm before clipping", lambda axes: _gradients(axes, runs)),
        ("lr", "Learning rate", lambda axes: _rate(axes, runs)),
    ]
    panels = [panel for panel in panels if _measured(runs, panel[0])]
    if most := _most_responses(runs):
        title = "pass@k: one of k responses is right" if most > 1 else "pass@1"
        panels.insert(0, ("pass_at_1", title, lambda axes: _pass(axes, runs)))
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = new_figure(rows, columns, width=max(9.6, 4.6 * columns), height=1.1 + 3.1 * rows)
    for axes, (_, title, draw) in zip(grid.flat, panels):
        draw(axes)
        axes.set_title(title)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("step")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    if handles:
        grid.flat[0].legend(handles, labels, loc="best")
    return save(
        figure,
        path,
        "The policy: " + _finding(runs),
        "Running means (faint: each step), dots: validation. Look for a collapse of entropy, jumps of KL or gradients.",
    )


def _measured(runs: list[Run], name: str) -> bool:
    return any(len(run.series(name)[0]) for run in runs)


def _lines(axes: Axes, runs: list[Run], name: str) -> None:
    styles = run_styles(runs)
    for run in runs:
        raw_and_smooth(axes, *run.series(name), run.label, styles[run.label])


def _length(axes: Axes, runs: list[Run]) -> None:
    styles = run_styles(runs)
    _lines(axes, runs, "response_length_mean")
    for run in runs:
        validation_points(axes, *run.evaluation_series("response_length_mean"), styles[run.label])
    axes.set_ylim(bottom=0)


def _gradients(axes: Axes, runs: list[Run]) -> None:
    _lines(axes, runs, "grad_norm")
    values = [value for run in runs for value in run.series("grad_norm")[1].tolist()]
    # One explosion would leave nothing to see of the rest.
    if min(values) > 0 and max(values) > 20 * sorted(values)[len(values) // 2]:
        axes.set_yscale("log")


def _rate(axes: Axes, runs: list[Run]) -> None:
    styles = run_styles(runs)
    for run in runs:
        axes.plot(*run.series("lr"), label=run.label, **styles[run.label])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))


def _pass(axes: Axes, runs: list[Run]) -> None:
    """pass@1 and pass@k of all responses of each run; of a single run those between them, too."""
    styles = run_styles(runs)
    for run in runs:
        ks = _responses(run)
        wanted = ks if len(runs) == 1 else sorted({*ks[:1], *ks[-1:]})
        for place, k in enumerate(wanted):
            style: dict[str, Any] = dict(styles[run.label])
            style["alpha"] = 1.0 if len(wanted) == 1 else 0.35 + 0.65 * place / (len(wanted) - 1)
            name = f"k = {k}" if len(runs) == 1 else f"{run.label}, k = {k}"
            steps, values = run.series(f"pass_at_{k}")
            axes.plot(
                steps, smooth(values), label=name, **style
            )  # each step's values would hide the other lines
    axes.set_ylim(-0.02, 1.02)


def _responses(run: Run) -> list[int]:
    """The k of the run's pass@k, ascending."""
    return sorted(
        {int(match[1]) for row in run.training_rows for name in row if (match := _PASS.fullmatch(name))}
    )


def _most_responses(runs: list[Run]) -> int:
    return max((k for run in runs for k in _responses(run)), default=0)


def _finding(runs: list[Run]) -> str:
    """Of each run how entropy and length have gone."""
    texts = []
    for run in runs:
        told = []
        for name, word, digits in (("entropy", "entropy", 2), ("response_length_mean", "length", 0)):
            first, last = run.ends(name)
            if math.isfinite(last):
                told.append(f"{word} {first:.{digits}f} → {last:.{digits}f}")
        if told:
            texts.append(f"{run.label} {', '.join(told)}" if len(runs) > 1 else ", ".join(told))
    return "; ".join(texts) or "over steps"
