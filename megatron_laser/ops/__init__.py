"""The log-prob op: hidden rows times a vocabulary shard to one log-prob per row, never the logits."""

from megatron_laser.ops.api import available_backends, few_row_logprob, linear_logprob, set_logprob
from megatron_laser.ops.passes import RowLoss
from megatron_laser.ops.sets import Sets
from megatron_laser.ops.settings import Settings, configure, settings
from megatron_laser.ops.types import IGNORE_LABEL, LogProbs, check_labels
from megatron_laser.ops.weight_gradient import add_weight_gradient_to_main_grad

__all__ = [
    "IGNORE_LABEL",
    "LogProbs",
    "RowLoss",
    "Sets",
    "Settings",
    "add_weight_gradient_to_main_grad",
    "available_backends",
    "check_labels",
    "configure",
    "few_row_logprob",
    "linear_logprob",
    "set_logprob",
    "settings",
]
