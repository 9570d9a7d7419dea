"""From the steps' records to figures: medians, bootstrap intervals over rounds, phases, accuracy curves."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

PHASES = ("generate", "grade", "logprob", "train", "sync")
_RESAMPLES = 4000


@dataclass
class Side:
    """One trainer's steps. `rounds[r][i]`: record of step i of its turn in round r, warm-up left out.

    A record has `seconds`, seconds for each of PHASES that the side has, `reward` (mean over the batch) and
    `response_length` (tokens). `steps` has all records, the warm-up's too, in order.
    """

    name: str
    facts: dict[str, Any]
    rounds: list[list[dict[str, Any]]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def seconds(self) -> NDArray[np.float64]:
        """[rounds, steps of a turn] seconds."""
        return np.array([[step["seconds"] for step in turn] for turn in self.rounds])

    def summary(self) -> dict[str, Any]:
        """The side's figures, for JSON."""
        timed = [step for turn in self.rounds for step in turn]
        phases = {phase: statistics.median(step.get(phase, 0.0) for step in timed) for phase in PHASES}
        phases["other"] = statistics.median(
            step["seconds"] - sum(step.get(phase, 0.0) for phase in PHASES) for step in timed
        )
        low, high = _interval(np.median(_resample(self.seconds()), axis=(1, 2)))
        return {
            "median_seconds": float(np.median(self.seconds())),
            "low": low,
            "high": high,
            "phases": phases,
            "mean_response_length": statistics.fmean(step["response_length"] for step in timed),
            "facts": self.facts,
            "seconds": [step["seconds"] for step in timed],
            "accuracy": [step["reward"] for step in self.steps],
        }


def ratio(ours: Side, theirs: Side) -> dict[str, float]:
    """Median seconds of `ours` over those of `theirs`, with a 95 % interval: rounds are resampled as pairs."""
    left, right = ours.seconds(), theirs.seconds()
    resampled = np.median(_resample(left), axis=(1, 2)) / np.median(_resample(right), axis=(1, 2))
    low, high = _interval(resampled)
    return {"ratio": float(np.median(left) / np.median(right)), "low": low, "high": high}


def accuracy_windows(side: Side, window: int) -> list[float]:
    """Mean accuracy in consecutive windows of steps."""
    rewards = [step["reward"] for step in side.steps]
    return [statistics.fmean(rewards[start : start + window]) for start in range(0, len(rewards), window)]


def _resample(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[resamples, rounds, steps]: rounds drawn with replacement, the same draws for every side."""
    draws = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    return values[draws]


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
