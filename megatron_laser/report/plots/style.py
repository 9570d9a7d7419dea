"""How the report's figures look: sizes, colours that colour-blind readers can tell apart, titles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_laser.report.run_data import Run

FloatArray = NDArray[np.float64]

# Okabe and Ito's palette; runs also differ in line style, right and wrong never share a run's colours.
_RUN_COLOURS = {"LaSeR": "#0072B2", "GRPO": "#E69F00"}
_MORE_COLOURS = ("#56B4E9", "#000000", "#D55E00", "#8C6D1F")
_LINE_STYLES = ("-", "--", "-.", ":")
_SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
RIGHT, WRONG = "#009E73", "#AA3377"
_GREY = "#595959"
_RC: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.0,
}


def styled() -> Any:
    """Context in which figures are made; leaves matplotlib's global settings alone."""
    return rc_context(rc=_RC)  # type: ignore[arg-type]


def new_figure(
    rows: int = 1, columns: int = 1, *, height: float = 4.6, width: float = 9.6, **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """A figure (never shown, no pyplot state) and its axes as an array [rows, columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Figure, path: Path, finding: str, reading: str) -> Path:
    """Title the figure by what it shows and how to read it, and write it as PNG."""
    figure.suptitle(f"{finding}\n", x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    inches = figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.42 / inches, reading, ha="left", va="center", fontsize=9.5, color=_GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def run_styles(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Label -> colour and line style, the same in every figure of a report."""
    styles: dict[str, dict[str, Any]] = {}
    free = list(_MORE_COLOURS)
    taken: set[str] = set()
    for index, run in enumerate(runs):
        colour = _RUN_COLOURS.get(run.kind)
        if colour is None or colour in taken:
            colour = free[index % len(free)]
        taken.add(colour)
        styles[run.label] = {"color": colour, "linestyle": _LINE_STYLES[index % len(_LINE_STYLES)]}
    return styles


def series_style(index: int) -> dict[str, Any]:
    """Colour and line of one of several curves of one run; all are different up to 32."""
    turns, colour = divmod(index, len(_SERIES_COLOURS))
    return {"color": _SERIES_COLOURS[colour], "linestyle": _LINE_STYLES[turns % len(_LINE_STYLES)]}


def smooth(values: FloatArray) -> FloatArray:
    """Centred running mean over a twentieth of the values, narrower at the ends; at most 51 wide."""
    window = min(51, 2 * (len(values) // 40) + 1)
    if window < 3:
        return values
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def raw_and_smooth(
    axes: Axes, steps: FloatArray, values: FloatArray, label: str, style: dict[str, Any]
) -> None:
    """The values faint, their running mean strong."""
    if len(values) == 0:
        return
    if len(values) >= 40:
        axes.plot(steps, values, color=style["color"], alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth(values), label=label, **style)


def validation_points(axes: Axes, steps: FloatArray, values: FloatArray, style: dict[str, Any]) -> None:
    """Evaluations as markers."""
    axes.plot(
        steps,
        values,
        marker="o",
        markersize=6,
        markeredgecolor="white",
        linestyle="none",
        color=style["color"],
    )


def no_data(axes: Axes, text: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.text(
        0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=_GREY, backgroundcolor="w"
    )
    axes.set_xticks([])
    axes.set_yticks([])
