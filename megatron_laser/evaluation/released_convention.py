"""The score as a verifier, counted as the released evaluator counts it: over all responses, also those without a score.

In RUCBM/LaSeR (`src/calculate_self_rewarding_scores.py`) every response counts. One without a box has score 0, so it is
called wrong, also where it ended by itself; one with a box has the score that stands behind an EOS which is put there,
also where the response was cut off. A response whose grading failed is a wrong one. The project's own metrics
(`summary`) are over responses that ended by themselves and were graded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_laser.algorithms.metrics import VerificationMetrics, verification_metrics
from megatron_laser.evaluation.records import EvaluationRecord


def released_scores(
    records: Sequence[EvaluationRecord], *, missing_is_zero: bool = False
) -> list[float | None]:
    """What the released evaluator compares with its threshold, for each record; None: unknown.

    Args:
        missing_is_zero: a response with a box and without any score has 0, too: nobody gave it one. False: that score
            was not asked for (`evaluate`'s `force_end_below`), so it is unknown.
    """
    return [_score(record, 0.0 if missing_is_zero else None) for record in records]


def released_summary(
    records: Sequence[EvaluationRecord], *, threshold: float = 0.5, missing_is_zero: bool = False
) -> dict[str, float]:
    """`released_self_reward_<metric>` over all responses, and how many got their scores behind a forced end.

    All metrics are NaN where no response has a score, or where one is unknown.
    """
    scores = released_scores(records, missing_is_zero=missing_is_zero)
    known = [score for score in scores if score is not None]
    if len(known) < len(scores) or not any(record.score is not None for record in records):
        metrics = VerificationMetrics(*[math.nan] * len(VerificationMetrics._fields))
    else:
        metrics = verification_metrics(
            known, [float(record.right) for record in records], threshold=threshold
        )
    return {
        "num_forced": float(
            sum(record.score is None and record.forced_score is not None for record in records)
        ),
        **{f"released_self_reward_{name}": value for name, value in metrics._asdict().items()},
    }


def _score(record: EvaluationRecord, missing: float | None) -> float | None:
    if record.extracted is None:
        return 0.0
    if record.score is not None:
        return record.score
    return missing if record.forced_score is None else record.forced_score
