"""What the log-prob op returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LogProbs(NamedTuple):
    """Per labelled row: the label's log-prob and, when asked for, the entropy of the row's distribution.

    logprobs: [rows] float32 (float64 for float64 inputs), 0 on rows without a label.
    entropy: [rows] of the same dtype, in nats, 0 on rows without a label; None unless `with_entropy`.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
