"""The figure of `bench logprob` and `bench score`: time over floor, a group of bars for every shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_laser.observability.plot_style import new_figure, save, styled

if TYPE_CHECKING:
    from megatron_laser.benchmarks.logprob_report import Report

_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#8C6D1F", "#E69F00", "#D55E00", "#AA3377", "#000000", "#999999")


def plot(report: Report, path: Path) -> Path:
    """Write the figure; contenders without a time are left out."""
    shapes = list(dict.fromkeys(one.shape for one in report.measurements))
    names = list(dict.fromkeys(one.implementation for one in report.measurements))
    panels = [("forward", "forward_floor")]
    if any(one.backward is not None for one in report.measurements):
        panels.append(("backward", "backward_floor"))
    width = 0.8 / len(names)
    with styled():
        figure, axes = new_figure(len(panels), 1, height=3.4 * len(panels) + 0.8)
        for panel, (field, floor) in zip(axes[:, 0], panels):
            for index, name in enumerate(names):
                found = [
                    (position, getattr(one, field) / getattr(one, floor))
                    for position, shape in enumerate(shapes)
                    for one in report.measurements
                    if one.shape == shape and one.implementation == name and getattr(one, field) is not None
                ]
                panel.bar(
                    [position + (index - (len(names) - 1) / 2) * width for position, _ in found],
                    [ratio for _, ratio in found],
                    width,
                    label=name,
                    color=_COLOURS[index % len(_COLOURS)],
                )
            panel.axhline(1.0, color="black", linewidth=1.0)
            panel.set_yscale("log")
            panel.set_xticks(range(len(shapes)), [str(shape).replace(" (", "\n(") for shape in shapes])
            panel.set_ylabel(f"{field}: time / floor")
        axes[0, 0].legend(ncols=3, loc="upper left", bbox_to_anchor=(0, 1.28), fontsize=8)
        return save(
            figure,
            path,
            f"{report.title} on {report.ceilings.device}",
            "Lower is better; 1 is the floor at the device's measured ceilings. Groups: rows x hidden x columns.",
        )
