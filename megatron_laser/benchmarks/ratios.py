"""How two arms of an interleaved benchmark compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 2000


def median_ratio(figures: Sequence[float], over: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of figures / over, round by round: a 95 % bootstrap interval of the median, seed 0."""
    ratios = np.array(figures) / np.array(over)
    medians = np.median(np.random.default_rng(0).choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)
