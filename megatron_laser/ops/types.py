"""What the op is given and gives back: labels with their checks, log-probs with their entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch

IGNORE_LABEL = -100


def check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError unless every label is -100 or in [0, vocab_size).

    labels: [rows] int64. Waits for the device, so it is a check for tests, start-up and debugging; without it
    a label outside the vocabulary gives NaN.
    """
    bad = (labels != IGNORE_LABEL) & ((labels < 0) | (labels >= vocab_size))
    count = int(bad.sum())
    if count:
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"labels: {count} of {labels.numel()} are outside the vocabulary; the first is "
            f"labels[{row}] = {int(labels[row])}; expected {IGNORE_LABEL} or an id in [0, {vocab_size}). "
            "Check that the ids come from this model's tokenizer and that score_token is one of them."
        )


class LogProbs(NamedTuple):
    """Per labelled row: the label's log-prob and, when asked for, the entropy of the row's distribution.

    logprobs: [rows] float32 (float64 for float64 inputs), 0 on rows without a label.
    entropy: [rows] of the same dtype, in nats, 0 on rows without a label; None unless `with_entropy`.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
