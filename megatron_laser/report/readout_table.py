"""What the report says of each further readout, where a run has several."""

from __future__ import annotations

import math

from megatron_laser.report.comparison_table import filled_columns, first_to_last, fixed
from megatron_laser.report.run_data import Run

# heading, metric, decimals; of the response's score the metrics have names of their own
_NUMBERS = (
    ("F1", "f1", 3),
    ("ECE", "ece", 3),
    ("Brier", "brier", 3),
    ("Right: mean score", "score_right_mean", 3),
    ("Wrong: mean score", "score_wrong_mean", 3),
    ("Places a step", "points", 0),
)
_SCORE = {
    "loss": "self_reward_loss",
    "auroc": "self_reward_auroc",
    "f1": "self_reward_f1",
    "ece": "self_reward_ece",
    "brier": "self_reward_brier",
    "score_right_mean": "score_right_mean",
    "score_wrong_mean": "score_wrong_mean",
}
SCORE_LABEL = "the response's score"


def readout_table(runs: list[Run]) -> str:
    """Markdown: one row for each readout of each run, the response's score first; "" where no run has several.

    Of the rollouts, means over the last tenth of the steps.
    """
    runs = [run for run in runs if run.further_readouts]
    if not runs:
        return ""
    head = ["Run", "Readout", "Loss, first → last", "AUROC, first → last", *(name for name, _, _ in _NUMBERS)]
    head.append("AUROC by quarter of the response")
    lines = []
    for run in runs:
        for name in (None, *run.further_readouts):
            last = [
                fixed(run.ends(readout_metric(name, metric))[1], digits) for _, metric, digits in _NUMBERS
            ]
            quarters = quarter_aurocs(run, name)
            lines.append(
                [
                    run.label,
                    SCORE_LABEL if name is None else name,
                    first_to_last(run, readout_metric(name, "loss"), 4),
                    first_to_last(run, readout_metric(name, "auroc")),
                    *last,
                    ", ".join(fixed(value) for value in quarters) if quarters else "–",
                ]
            )
    return filled_columns(head, lines)


def readout_metric(readout: str | None, metric: str) -> str:
    """What a readout's metric is called in metrics.jsonl; None: the response's score."""
    return _SCORE.get(metric, "") if readout is None else f"readout/{readout}/{metric}"


def quarter_aurocs(run: Run, readout: str | None) -> list[float]:
    """[4] AUROC of the places in each quarter of their responses, over the last tenth of the steps, NaN without any;
    [] for a readout that has one place a response."""
    values = [run.ends(readout_metric(readout, f"auroc_quarter_{part}"))[1] for part in range(1, 5)]
    return values if any(map(math.isfinite, values)) else []
