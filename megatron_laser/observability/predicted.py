"""The seconds of a step's phases that were predicted, beside those that were measured, and what is said of the two."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

STEP = "step"
PHASES = (STEP, "generate", "grade", "logprob", "train", "sync")

_WINDOW = 20  # steps
_FEWEST = 5
_OFF = 0.3  # of the prediction
_WORTH = 0.1  # of the step
_CHANGED = 1.3  # since it was said
_WHERE = 'see "Predicted and measured" in docs/observing.md'


def measured_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """{phase: seconds} of the phases that took any."""
    names = {phase: "total" if phase == STEP else phase for phase in PHASES}
    found = {phase: metrics.get(f"time/{name}", 0.0) for phase, name in names.items()}
    return {phase: seconds for phase, seconds in found.items() if seconds > 0.0}


def plan_metrics(predicted: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """plan/<phase>_seconds, and plan/<phase>_ratio, measured over predicted, where both are above 0."""
    measured = measured_seconds(metrics)
    found = {}
    for phase in PHASES:
        if phase not in predicted:
            continue
        found[f"plan/{phase}_seconds"] = predicted[phase]
        if predicted[phase] > 0.0 and phase in measured:
            found[f"plan/{phase}_ratio"] = measured[phase] / predicted[phase]
    return found


@dataclass(frozen=True)
class _Seconds:
    """One step's, by phase."""

    predicted: Mapping[str, float]
    measured: Mapping[str, float]


class PredictionWatch:
    """Says once in words which phases take another time than predicted; again when that changes much.

    It looks at medians over the last 20 steps, of at least 5, and leaves out the first, which starts things.
    """

    def __init__(self, machine: str) -> None:
        """Args: machine: whose prediction it is, as the user has named it."""
        self._machine = machine
        self._window: deque[_Seconds] = deque(maxlen=_WINDOW)
        self._first = True
        self._said: dict[str, float] = {}

    def add(self, predicted: Mapping[str, float], metrics: Mapping[str, float]) -> list[str]:
        """Count a step; what is to be said of it."""
        if self._first:
            self._first = False
            return []
        self._window.append(_Seconds(predicted, measured_seconds(metrics)))
        if len(self._window) < _FEWEST:
            return []
        total = _median([step.measured for step in self._window], STEP)
        lines: list[str] = []
        off = False
        for phase in (*PHASES[1:], STEP):  # of a step that is off a phase says more
            expected = _median([step.predicted for step in self._window], phase)
            seconds = _median([step.measured for step in self._window], phase)
            ratio = seconds / expected if expected > 0.0 else 1.0
            if seconds < _WORTH * total or abs(ratio - 1.0) <= _OFF or (phase == STEP and off):
                continue
            off = True
            said = self._said.get(phase)
            if said is None or not 1 / _CHANGED < ratio / said < _CHANGED:
                self._said[phase] = ratio
                lines.append(self._line(phase, seconds, expected))
        return lines

    def _line(self, phase: str, seconds: float, expected: float) -> str:
        subject = "a step takes" if phase == STEP else f"{phase} takes"
        by = abs(seconds / expected - 1.0)
        return (
            f"{subject} {seconds:.3g} s where {expected:.3g} s were predicted for {self._machine}: {by:.0%} "
            f"{'more' if seconds > expected else 'less'} (medians of {len(self._window)} steps); {_WHERE}"
        )


def _median(steps: list[Mapping[str, float]], phase: str) -> float:
    # One of them: between two halves of a window the mean of the middle ones is neither.
    return statistics.median_low([step.get(phase, 0.0) for step in steps])
