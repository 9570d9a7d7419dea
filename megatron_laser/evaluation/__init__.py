"""Evaluation on any engine, in training and at test time: one path from prompts to numbers.

- `evaluator.evaluate` takes an engine and prompts: samples what is missing (`responses`, kept on disk as they arrive),
  grades and scores each response (`records`), and turns the records into numbers and votes (`summary`).
- `progress` says meanwhile how far it is.
- `validation` calls it for a training run's validation and test splits, on the weights that the run's engine holds.
- `benchmarks/` calls it for `megatron-laser eval`; `model_folder` is the model, `engine_choice` who generates.
- `pinned_weights` makes sure that a command's weights stay the same; `weight_identity` tells weights apart by content.
"""

from megatron_laser.evaluation.evaluator import EvaluationSummary, evaluate
from megatron_laser.evaluation.records import EvaluationRecord, read_records, write_records
from megatron_laser.evaluation.responses import EvaluationEngine, generation_batch, partial_responses_path
from megatron_laser.evaluation.summary import evaluation_detail, summarize

__all__ = [
    "EvaluationEngine",
    "EvaluationRecord",
    "EvaluationSummary",
    "evaluate",
    "evaluation_detail",
    "generation_batch",
    "partial_responses_path",
    "read_records",
    "summarize",
    "write_records",
]
