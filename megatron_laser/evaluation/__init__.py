"""Evaluation on any engine: records, votes, and how well the self-reward tells right from wrong."""

from megatron_laser.evaluation.evaluator import EvaluationEngine, EvaluationSummary, evaluate
from megatron_laser.evaluation.records import EvaluationRecord, read_records, write_records
from megatron_laser.evaluation.summary import summarize

__all__ = [
    "EvaluationEngine",
    "EvaluationRecord",
    "EvaluationSummary",
    "evaluate",
    "read_records",
    "summarize",
    "write_records",
]
