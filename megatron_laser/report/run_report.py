"""The report of one or several runs: a table, what it says in words, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_laser.files import write_atomically
from megatron_laser.report.run_data import Run, load_runs

_READING = """\
Right and wrong are the verifier's verdicts. The score is r_s = beta (log pi(score token | problem, response) −
c_ref), on a scale where 1 and 0 are what right and wrong responses are trained towards (`laser.targets`); a response
is called right when it exceeds 0.5. F1 is the harmonic mean of the accuracies on right and on wrong responses. AUROC
is the chance that a right response has the higher value than a wrong one: 0.5 is chance. Intervals are bootstraps
over problems: they do not cover what another seed of training would change. Votes with k < K average over random
subsets of each problem's responses.
"""


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write report.md and plots/*.png from the runs' metrics.jsonl, events.jsonl, config.yaml and evaluation/.

    Args:
        run_dirs: output folders; put LaSeR beside GRPO by giving both. Runs may differ in length, and
            evaluations may be missing.
        output: a folder, or a path that ends in .md; default the first run's folder.

    Returns:
        Path of the report; the figures lie in plots/ beside it.

    Raises:
        ValueError: no runs. FileNotFoundError: a folder without metrics.jsonl.
    """
    runs = load_runs(run_dirs)
    target = Path(run_dirs[0]) if output is None else Path(output)
    path = target if target.suffix == ".md" else target / "report.md"
    figures = _draw(runs, path.parent / "plots")
    write_atomically(path, _text(runs, figures))
    return path


def _draw(runs: list[Run], folder: Path) -> list[tuple[str, Path]]:
    """(heading, figure) of every figure that the runs have data for."""
    from megatron_laser.report.plots import drift, evaluation, policy, readouts, sources, training
    from megatron_laser.report.plots.style import styled

    makers = (
        ("Accuracy over steps", training.plot_learning, "accuracy"),
        ("Self-reward over steps", training.plot_self_reward, "self_reward"),
        ("Scores of right and wrong responses", training.plot_scores, "scores"),
        ("The policy over steps", policy.plot_policy, "policy"),
        ("Readouts over steps", readouts.plot_readouts, "readouts"),
        ("Drift of the score token", drift.plot_drift, "drift"),
        ("Sources over steps", sources.plot_sources, "sources"),
        ("Calibration", evaluation.plot_calibration, "calibration"),
        ("Votes", evaluation.plot_votes, "votes"),
        ("Time", training.plot_time, "time"),
    )
    figures: list[tuple[str, Path]] = []
    with styled():
        for heading, maker, name in makers:
            drawn = maker(runs, folder / f"{name}.png")
            if drawn is None:
                (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
            else:
                figures.append((heading, drawn))
    return figures


def _text(runs: list[Run], figures: list[tuple[str, Path]]) -> str:
    from megatron_laser.report.alarm_list import alarm_list
    from megatron_laser.report.changed_settings import changed_settings
    from megatron_laser.report.comparison_table import comparison_table
    from megatron_laser.report.conclusions import findings
    from megatron_laser.report.readout_table import readout_table
    from megatron_laser.report.source_table import source_table
    from megatron_laser.report.speed_table import speed_table
    from megatron_laser.report.went_wrong import went_wrong

    readouts, sources, speed = readout_table(runs), source_table(runs), speed_table(runs)
    sections = [
        f"# {' and '.join(run.label for run in runs)}\n",
        comparison_table(runs),
        *(("## Readouts\n", readouts) if readouts else ()),
        *(("## Sources of the data\n", sources) if sources else ()),
        *(("## Speed\n", speed) if speed else ()),
        *changed_settings(runs),
        "## What the numbers say\n",
        "\n".join(f"- {sentence}" for sentence in findings(runs)) + "\n",
        "## Alarms\n",
        alarm_list(runs),
        *went_wrong(runs),
    ]
    for heading, path in figures:
        sections += [f"## {heading}\n", f"![{heading}](plots/{path.name})\n"]
    sections += ["## How to read this\n", _READING]
    return "\n".join(sections)
