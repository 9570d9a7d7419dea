"""How well given scores tell right responses from wrong ones: results.json, report.md and plots, as of `eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_laser.evaluation.benchmarks.folder import as_json
from megatron_laser.evaluation.benchmarks.run import averages
from megatron_laser.evaluation.records import EvaluationRecord
from megatron_laser.evaluation.summary import evaluation_detail
from megatron_laser.files import write_atomically
from megatron_laser.report.benchmark_report import write_benchmark_report

_OF_LENGTH = ("response_length_mean", "length_auroc", "boxed_length_auroc", "score_length_spearman")


def write_score_report(
    benchmarks: Mapping[str, Sequence[EvaluationRecord]],
    output: Path,
    *,
    judged: str,
    threshold: float = 0.5,
    missing_is_zero: bool = False,
    lengths_known: bool = True,
    boxes_known: bool = True,
    seed: int = 1234,
) -> dict[str, Any]:
    """Judge the scores of records and write what was found.

    Args:
        judged: whose scores of what, for the report's head.
        threshold: a response is called right when its score exceeds it.
        missing_is_zero: see `evaluation.released_convention`.
        lengths_known: False: leave out what is said by length. boxes_known: False: and what depends on boxes.

    Returns:
        What results.json holds.
    """
    details: dict[str, dict[str, Any]] = {}
    for name, records in benchmarks.items():
        detail = evaluation_detail(records, seed=seed, threshold=threshold, missing_is_zero=missing_is_zero)
        if not lengths_known:
            detail["summary"] |= {key: math.nan for key in _OF_LENGTH}
            detail["by_length"] = []
        if not boxes_known:
            detail["verification"].pop("released", None)
            released = [key for key in detail["summary"] if key.startswith("released_")]
            detail["summary"] |= dict.fromkeys([*released, "boxed_fraction"], math.nan)
        details[name] = {"settings": {}, **detail}
    scores = [r.score for records in benchmarks.values() for r in records if r.score is not None]
    outside = sum(not 0 <= score <= 1 for score in scores)
    results = {
        "judged": f"{judged}; called right above {threshold:g}; {outside} of {len(scores)} scores are outside [0, 1] "
        "(ECE, Brier and weighted votes clamp them).",
        "threshold": threshold,
        "benchmarks": details,
        "average": averages(details),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "results.json", json.dumps(as_json(results), indent=1) + "\n")
    shown = {
        name: [(r.score, r.right) for r in records if r.score is not None and r.graded]
        for name, records in benchmarks.items()
    }
    write_benchmark_report(as_json(results), shown, output)
    return results
