"""Sections that say which evaluation is the best: what is kept of it, and when a run ends for want of a better one."""

from __future__ import annotations

from typing import Literal

from megatron_laser.config.schema.fields import Count, NonNegative, Section, Text


class BestConfig(Section):
    """The checkpoint of the best evaluation on `data.validation`, which is kept beside those of `checkpoint.keep_last`.

    RUN/best.json names it, and RUN/checkpoints/best is a link to it. The initial model is no candidate."""

    metric: Text | None = None
    """What it is the best by: a metric of evaluations, such as `eval/accuracy` or, of one of several sources,
    `eval/source/math500/accuracy`. The best is saved although `checkpoint.every` does not fall on it; of equal ones the
    first. null: none is kept."""
    mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value is the best."""


class EarlyStopConfig(Section):
    """A run that does not get better ends before `run.steps`: with its final evaluation, export and report."""

    metric: Text | None = None
    """The metric of evaluations that has to get better, such as `eval/accuracy`. null: no run ends early."""
    mode: Literal["max", "min"] = "max"
    """Whether larger or smaller values are better."""
    patience: Count = 3
    """Evaluations in a row without a better one, after which the run ends."""
    min_delta: NonNegative = 0.0
    """A better one is better than the best before it by more than this."""
