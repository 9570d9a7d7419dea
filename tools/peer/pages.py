"""The result for people: tables as Markdown, and the accuracy curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peer.summary import PHASES, Side, accuracy_windows

_WINDOW = 20


def tables(result: dict[str, Any], sides: list[Side]) -> str:
    """Seconds, phases and accuracy, as Markdown that also reads well in a terminal."""
    summaries = result["sides"]
    rows = [["", "s/step", "95 % interval", "/ TRL", "95 % interval", "tokens/response"]]
    for side in sides:
        one, over = summaries[side.name], result["ratios"].get(side.name)
        rows.append(
            [
                side.name,
                f"{one['median_seconds']:.4f}",
                f"{one['low']:.4f}-{one['high']:.4f}",
                f"{over['ratio']:.3f}" if over else "1",
                f"{over['low']:.3f}-{over['high']:.3f}" if over else "",
                f"{one['mean_response_length']:.1f}",
            ]
        )
    phases = [["milliseconds", *PHASES, "other"]]
    for side in sides:
        split = summaries[side.name]["phases"]
        phases.append([side.name, *(f"{1000 * split[phase]:.1f}" for phase in phases[0][1:])])
    curves = [["accuracy, steps", *(side.name for side in sides)]]
    windows = [accuracy_windows(side, _WINDOW) for side in sides]
    for index, values in enumerate(zip(*windows)):
        last = min((index + 1) * _WINDOW, len(sides[0].steps))
        curves.append([f"{index * _WINDOW + 1}-{last}", *(f"{value:.3f}" for value in values)])
    return "\n\n".join(_table(part) for part in (rows, phases, curves))


def page(result: dict[str, Any], sides: list[Side], explanation: str, picture: str) -> str:
    """The whole Markdown page."""
    facts = result["facts"]
    lines = [
        "# Seconds per step, and accuracy, beside TRL's GRPOTrainer",
        "",
        f"    {result['command']}",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        tables(result, sides),
        "",
        f"![Accuracy of both trainers over the steps]({picture})",
        "",
        "## What is compared",
        "",
        explanation.strip(),
        "",
    ]
    return "\n".join(lines)


def draw(sides: list[Side], path: Path) -> None:
    """The accuracy of the training batches over the steps, and as a moving mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, side in enumerate(sides):
        rewards = np.array([step["reward"] for step in side.steps])
        steps = np.arange(1, len(rewards) + 1)
        axes.plot(steps, rewards, color=f"C{number}", alpha=0.2, linewidth=0.8)
        width = min(_WINDOW, len(rewards))
        mean = np.convolve(rewards, np.ones(width) / width, mode="valid")
        # dashed from the third on: runs that compute the same lie on each other
        style = "-" if number < 2 else "--"
        axes.plot(steps[width - 1 :], mean, style, color=f"C{number}", label=side.name)
    axes.set(xlabel="step", ylabel=f"accuracy of the batch (mean of {_WINDOW} steps)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
