"""What the report says of each source of the data, where a run has several."""

from __future__ import annotations

import math

from megatron_laser.report.comparison_table import filled_columns, first_to_last, fixed
from megatron_laser.report.run_data import Run

# heading, metric of the rollouts, decimals
_ROLLOUTS = (
    ("Self-reward F1", "self_reward_f1", 3),
    ("AUROC", "self_reward_auroc", 3),
    ("Mean length", "response_length_mean", 1),
)
_EVALUATION = (
    ("accuracy", "accuracy"),
    ("F1", "self_reward_f1"),
    ("AUROC", "self_reward_auroc"),
    ("majority", "majority"),
    ("weighted majority", "weighted_majority"),
)


def source_table(runs: list[Run]) -> str:
    """Markdown: one row for each source of each run; "" where no run has several.

    Of the rollouts means over the last tenth of the steps, as in the other table; of evaluations each split's last.
    """
    runs = [run for run in runs if run.sources]
    if not runs:
        return ""
    head = ["Run", "Source", "Accuracy of rollouts, first → last", *(heading for heading, _, _ in _ROLLOUTS)]
    splits = sorted({split for run in runs for split in run.evaluations})
    columns = [(split, heading, metric) for split in splits for heading, metric in _EVALUATION]
    head += [f"{split}: {heading}" for split, heading, _ in columns]
    lines = []
    for run in runs:
        for source in run.sources:
            cells = [
                run.label,
                source,
                first_to_last(run, run.source_accuracy(source)),
                *(fixed(run.ends(f"source/{source}/{name}")[1], digits) for _, name, digits in _ROLLOUTS),
                *(fixed(_evaluated(run, split, f"source/{source}/{name}")) for split, _, name in columns),
            ]
            lines.append(cells)
    return filled_columns(head, lines)


def _evaluated(run: Run, split: str, name: str) -> float:
    evaluations = run.evaluations.get(split)
    return evaluations[-1].number(name) if evaluations else math.nan
