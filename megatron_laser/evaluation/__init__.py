"""Evaluation on any engine: records, votes, and how well the self-reward tells right from wrong."""

from megatron_laser.evaluation.arrivals import arrivals_path
from megatron_laser.evaluation.detail import evaluation_detail
from megatron_laser.evaluation.evaluator import EvaluationSummary, evaluate
from megatron_laser.evaluation.records import EvaluationRecord, read_records, write_records
from megatron_laser.evaluation.sampler import EvaluationEngine, generation_batch
from megatron_laser.evaluation.summary import summarize

__all__ = [
    "EvaluationEngine",
    "EvaluationRecord",
    "EvaluationSummary",
    "arrivals_path",
    "evaluate",
    "evaluation_detail",
    "generation_batch",
    "read_records",
    "summarize",
    "write_records",
]
