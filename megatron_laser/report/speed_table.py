"""What the report says of speed: tokens a second of each kind of GPU, MFU, who waited, and what was predicted."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from megatron_laser.report.run_data import Run

_PHASES = ("step", "generate", "grade", "logprob", "train", "sync")


def _tenths(value: float) -> str:
    return f"{value:,.1f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


# label, metric, how it is written
_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Tokens a second, over all GPUs: each", "rate/tokens_per_second_gpu", _tenths),
    ("Trained tokens a second, each trainer GPU", "rate/tokens_per_second_trainer_gpu", _tenths),
    ("Generated tokens a second, each server GPU", "rate/tokens_per_second_server_gpu", _tenths),
    ("GFLOPs a trained token", "rate/flops_per_token", lambda value: f"{value * 1e-9:.3g}"),
    ("MFU of updates", "mfu/train", _percent),
    ("MFU of log-prob passes", "mfu/logprob", _percent),
    ("MFU of generation", "mfu/generate", _percent),
    ("Trainer waits for rollouts", "idle/trainer", _percent),
    ("Servers have nothing to do", "idle/servers", _percent),
    ("Servers busy in a rollout", "servers/utilisation", _percent),
    ("Requests that run on a server", "servers/running_mean", _tenths),
    ("Requests that wait on a server", "servers/queued_mean", _tenths),
    ("Key/value slots in use", "servers/kv_usage_mean", _percent),
    ("Prompt tokens from the prefix cache", "servers/cache_hit_rate", _percent),
    ("Pipeline bubble, by the schedule", "pipeline_bubble", _percent),
    ("Busiest data-parallel rank over the mean", "rank_imbalance", lambda value: f"+{value:.1%}"),
)
BAR = "\\|"  # within a cell
_SPEED = ("rate/", "mfu/", "idle/", "plan/")


def speed_table(runs: list[Run]) -> str:
    """Markdown: one column a run, medians over its steps but the first; "" where no run has rates.

    The last rows are a step's seconds and those of its phases: predicted, measured, and the second over the first.
    """
    if not any(name.startswith(_SPEED) for run in runs for row in run.training_rows for name in row):
        return ""
    lines = [["Median over the steps", *(run.label for run in runs)], ["---", *["---:"] * len(runs)]]
    for label, name, written in _ROWS:
        values = [_median(run, name) for run in runs]
        if any(values):  # a bubble of 0 where nothing is split up is not worth a line
            lines.append([label, *("–" if value is None else written(value) for value in values)])
    for phase in _PHASES:
        cells = [_predicted(run, phase) for run in runs]
        if any(cells):
            label = "A step" if phase == "step" else phase.capitalize()
            lines.append([f"{label}: seconds predicted → measured", *(cell or "–" for cell in cells)])
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in line)} |" for line in lines) + "\n"


def _predicted(run: Run, phase: str) -> str:
    seconds, ratio = _median(run, f"plan/{phase}_seconds"), _median(run, f"plan/{phase}_ratio")
    measured = _median(run, f"time/{'total' if phase == 'step' else phase}")
    if seconds is None or ratio is None or measured is None:
        return ""
    return f"{seconds:.3g} → {measured:.3g} ({ratio:.2f})"


def _median(run: Run, name: str) -> float | None:
    """Without the first step of the run, which starts things; with it where it is the only one."""
    steps, values = run.series(name)
    later = values[steps > 1] if (steps > 1).any() else values
    return float(statistics.median(later.tolist())) if len(later) else None
