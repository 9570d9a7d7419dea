"""A contender of `bench logprob` and `bench score`, and the one that needs no package: all logits in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_laser.ops import IGNORE_LABEL
from megatron_laser.ops.tiles import accumulation_dtype

Op = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """One contender: (hidden, weight, labels) -> log-probs [rows], or their sum where `only_sum`.

    ours: a wrong result is an error, not a remark. main_grad: dW goes to the weight's float32 `main_grad`.
    half: the loss is the sum over every other row, and the others' upstream gradient is 0.
    remark: what the table adds, given hidden and weight.
    """

    name: str
    run: Op
    ours: bool = False
    only_sum: bool = False
    main_grad: bool = False
    half: bool = False
    remark: Callable[[torch.Tensor, torch.Tensor], str] = lambda hidden, weight: ""


def dense(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What most trainers do: all logits, in the accumulation dtype, then log_softmax and gather."""
    logits = torch.nn.functional.linear(hidden, weight).to(accumulation_dtype(hidden))
    logprobs = torch.log_softmax(logits, dim=1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return logprobs.where(labels != IGNORE_LABEL, 0)
