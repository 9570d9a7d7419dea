#!/usr/bin/env python
"""Paint docs/planning.png: what `megatron-laser plan` predicts for three models from 8 to 1024 GPUs.

python tools/plan_figure.py                       # a minute
python tools/plan_figure.py --gpu h200 --output h200.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from matplotlib.axes import Axes  # noqa: E402
from PIL import Image  # noqa: E402

from megatron_laser.planner.assumptions import read_assumptions  # noqa: E402
from megatron_laser.planner.configured import base_plan  # noqa: E402
from megatron_laser.planner.machine import read_machine  # noqa: E402
from megatron_laser.planner.ranking import NothingFits, Ranked, rank  # noqa: E402
from megatron_laser.planner.run_file import read_run  # noqa: E402
from megatron_laser.report.plots.style import new_figure, save, styled  # noqa: E402

MODELS = {"qwen2.5_7b": "Qwen2.5-7B", "qwen2.5_32b": "Qwen2.5-32B", "qwen3_30b_a3b": "Qwen3-30B-A3B"}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
COLOURS = {
    "generate": "#0072B2",
    "train": "#D55E00",
    "logprob": "#009E73",
    "grade": "#CC79A7",
    "sync": "#E69F00",
}
STYLES = {"qwen2.5_7b": ("-", "o"), "qwen2.5_32b": ("--", "s"), "qwen3_30b_a3b": ("-.", "^")}


def predict(gpu: str) -> dict[str, dict[int, Ranked | None]]:
    """The best layout of each recipe on each number of GPUs; None where nothing fits."""
    found: dict[str, dict[int, Ranked | None]] = {}
    machine = read_machine(gpu)
    for name in MODELS:
        run = read_run(ROOT / "examples" / name / "laser.yaml", [f"model.path={ROOT / 'examples' / name}"])
        base = base_plan(run.config, machine)
        assumptions = read_assumptions(run.config, None)
        found[name] = {}
        for gpus in GPUS:
            try:
                found[name][gpus] = rank(base, gpus, machine, assumptions).best
            except NothingFits:
                found[name][gpus] = None
    return found


def longest_phase(ranked: Ranked) -> str:
    """The phase that takes most of the step."""
    return max(ranked.step.phases, key=lambda phase: phase.seconds).name


def paint(found: dict[str, dict[int, Ranked | None]], gpu: str, path: Path) -> None:
    """Two panels: GPU hours of 1,000 steps, and seconds of one; a mark's colour is the longest phase."""
    with styled():
        figure, grid = new_figure(1, 2, width=10.6, height=4.9)
        for axes, value in (
            (grid[0, 0], lambda one: one.gpu_hours),
            (grid[0, 1], lambda one: one.step.seconds),
        ):
            for name, points in found.items():
                _curve(axes, name, points, value)
            axes.set(xscale="log", yscale="log", xlabel="GPUs, servers included")
            axes.set_xticks(GPUS, [str(count) for count in GPUS])
            axes.minorticks_off()
        grid[0, 0].set_title("GPU hours of 1,000 steps")
        grid[0, 1].set_title("Seconds of a step")
        _nice_ticks(grid[0, 0], (100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000))
        _nice_ticks(grid[0, 1], (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000))
        used = {longest_phase(one) for points in found.values() for one in points.values() if one}
        for phase in (phase for phase in COLOURS if phase in used):
            grid[0, 0].plot([], [], "o", color=COLOURS[phase], label=f"longest: {phase}")
        grid[0, 0].legend(loc="upper left")
        for name, label in MODELS.items():
            line, mark = STYLES[name]
            grid[0, 1].plot([], [], line, marker=mark, color="#595959", label=label)
        grid[0, 1].legend(loc="upper right")
        save(
            figure,
            path,
            "Every doubling of GPUs costs GPU hours: what is left of a step is generation",
            f"Best layout at each number of GPUs ({gpu}), 128 prompts x 8 samples a step. Predicted, not measured.",
        )
    Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)


def _curve(axes: Axes, name: str, points: dict[int, Ranked | None], value: Any) -> None:
    there = {gpus: one for gpus, one in points.items() if one is not None}
    line, mark = STYLES[name]
    axes.plot(
        list(there), [value(one) for one in there.values()], line, color="#9A9A9A", linewidth=1.6, zorder=1
    )
    for gpus, one in there.items():
        axes.plot(
            gpus, value(one), mark, color=COLOURS[longest_phase(one)], markersize=7, markeredgecolor="white"
        )


def _nice_ticks(axes: Axes, ticks: tuple[int, ...]) -> None:
    low, high = axes.get_ylim()
    axes.set_yticks(
        [tick for tick in ticks if low <= tick <= high], [f"{t:,}" for t in ticks if low <= t <= high]
    )
    axes.minorticks_off()


def main() -> int:
    """Predict and paint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="h100", help="a machine, as for `plan`")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "planning.png", help="where to")
    options = parser.parse_args()
    found = predict(options.gpu)
    for name, points in found.items():
        for gpus, one in points.items():
            words = (
                "does not fit"
                if one is None
                else (
                    f"{one.step.seconds:8.1f} s/step {one.gpu_hours:9,.0f} GPU h per 1,000 steps, "
                    f"longest {longest_phase(one)}"
                )
            )
            print(f"{MODELS[name]:<14} {gpus:>5} GPUs: {words}")
    paint(found, options.gpu, options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
