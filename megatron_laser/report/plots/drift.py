"""Figure of the score token's log-prob over a run's steps, on the same held responses (`laser.drift_every`)."""

from __future__ import annotations

from pathlib import Path

from megatron_laser.report.plots.style import RIGHT, WRONG, new_figure, save
from megatron_laser.report.run_data import Run

_LINES = (("right", RIGHT, "-"), ("wrong", WRONG, "--"))
_REFERENCE = "#777777"


def plot_drift(runs: list[Run], path: Path) -> Path | None:
    """log pi(z_c) - c_ref behind held responses, right and wrong, one panel a run that measured it."""
    runs = [run for run in runs if len(run.series("drift/logprob_mean")[0])]
    if not runs:
        return None
    figure, grid = new_figure(1, len(runs), width=max(9.6, 5.2 * len(runs)), sharex=True, sharey=True)
    for axes, run in zip(grid[0], runs):
        for name, colour, line in _LINES:
            steps, values = run.series(f"drift/{name}")
            axes.plot(steps, values, color=colour, linestyle=line, marker="o", markersize=3, label=name)
        steps, means = run.series("drift/reference_mean")
        spread_steps, spreads = run.series("drift/reference_std")
        if len(steps):
            axes.plot(steps, means, color=_REFERENCE, linestyle=":", label="reference, own responses")
        if len(steps) and len(steps) == len(spread_steps):
            axes.fill_between(
                steps, means - spreads, means + spreads, color=_REFERENCE, alpha=0.13, linewidth=0
            )
        for target in trained_towards(run):
            axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
        axes.set(title=run.label, xlabel="step")
        axes.margins(x=0.01)
        axes.legend(loc="best")
    grid[0, 0].set_ylabel("log π(score token) − c_ref, nats")
    return save(
        figure,
        path,
        "How the score token's log-prob drifts on held responses: " + _ends(runs),
        "The same responses all along. Dashed: what is trained towards. Band: one deviation of the reference.",
    )


def trained_towards(run: Run) -> tuple[float, float]:
    """log pi(z_c) - c_ref that right and wrong responses are trained towards, nats."""
    laser = run.config.get("laser") or {}
    first = (laser.get("readouts") or [{}])[0]
    beta = first.get("beta") or laser.get("beta") or 0.1
    right, wrong = first.get("targets") or laser.get("targets") or (1.0, 0.0)
    return right / beta, wrong / beta


def _ends(runs: list[Run]) -> str:
    texts = []
    for run in runs:
        last = {name: run.series(f"drift/{name}")[1][-1:] for name, _, _ in _LINES}
        told = [f"{name} {value[0]:+.2f}" for name, value in last.items() if len(value)]
        if told:
            texts.append(f"{run.label} {', '.join(told)}")
    return "; ".join(texts) or "not measured"
