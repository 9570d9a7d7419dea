"""Readouts: how log-probs of unused tokens at one place become a score, and what trains them there.

A *point* is one place of one response; a readout reads the log-probs of its tokens there, at temperature 1. Like
every loss here, a readout's is a sum over points divided by their number in the global batch.

Sources: LaSeR (arXiv 2510.14943) for one token, and for two its Eq. 16; CREDO for the sigmoid of a pair and for
group-shrunk targets.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_laser.algorithms.numerics import at_least_float32
from megatron_laser.algorithms.self_reward import self_reward_loss, self_reward_scores, weighted_mean

ScoreKind = Literal["scaled_logratio", "pair_sigmoid", "normalised"]
ReadoutLoss = Literal["mse", "brier", "bce", "margin"]


def readout_scores(
    logprobs: Tensor,
    *,
    kind: ScoreKind,
    beta: float = 1.0,
    ref_logprob: float | Tensor = 0.0,
    targets: tuple[float, float] = (1.0, 0.0),
) -> Tensor:
    """The score of each point, on the scale of its targets: about 1 where right, 0 where wrong.

    `scaled_logratio` is beta * (log p_1 - c_ref), LaSeR's (`self_reward_scores`); `pair_sigmoid` p_1 / (p_1 + p_2);
    `normalised` p_1 over the sum of all.

    Args:
        logprobs: [points, tokens]; NaN gives NaN.
        beta, ref_logprob: of `scaled_logratio`; the latter in nats, a number or [points].
        targets: (right, wrong), right above wrong; (1, 0) leaves the score as it is.

    Returns:
        [points], at least float32, differentiable in `logprobs`.
    """
    _check(logprobs, kind)
    if kind == "scaled_logratio":
        return self_reward_scores(logprobs[:, 0], ref_logprob=ref_logprob, beta=beta, targets=targets)
    share = _share(logprobs, kind)
    right, wrong = targets
    return share if (right, wrong) == (1.0, 0.0) else (share - wrong) / (right - wrong)


def readout_loss(
    logprobs: Tensor,
    labels: Tensor,
    right: Tensor,
    *,
    kind: ScoreKind,
    loss: ReadoutLoss,
    class_weights: tuple[float, float],
    count: int,
    beta: float = 1.0,
    ref_logprob: float | Tensor = 0.0,
    targets: tuple[float, float] = (1.0, 0.0),
    margin: float = 1.0,
) -> Tensor:
    """This micro-batch's part of a readout's loss: sum of class weight times the point's loss, divided by `count`.

    With t the label, s the score and p the readout's probability (`_share`, or of one token pi(z)):
    `mse` (s_raw - (wrong + (right - wrong) t))^2, with s_raw the score before it is put on its targets' scale;
    `brier` (p - t)^2; `bce` -t log p - (1 - t) log(1 - p), and of two tokens with `scaled_logratio`
    -t log p_1 - (1 - t) log p_2 (Eq. 16); `margin` max(0, margin - (2 t - 1)(2 s - 1)).

    Args:
        logprobs: [points, tokens], with a gradient. No points give a zero that still has one.
        labels: [points] in [0, 1]. right: [points] bool, the class that weights a point.
        class_weights: (right, wrong). count: points of this readout in the global batch of the optimizer step.

    Returns:
        Scalar, at least float32.
    """
    _check(logprobs, kind)
    if kind == "scaled_logratio" and logprobs.shape[1] == 1 and loss in ("mse", "bce"):
        return self_reward_loss(
            self_reward_scores(logprobs[:, 0], ref_logprob=ref_logprob, beta=beta),
            labels,
            right=right,
            class_weights=class_weights,
            num_scored=count,
            targets=targets,
            kind="mse" if loss == "mse" else "bce",
            ref_logprob=ref_logprob,
            beta=beta,
        )
    logprobs = at_least_float32(logprobs)
    labels = labels.to(logprobs.dtype)
    if loss == "bce":
        row_loss = _cross_entropy(logprobs, labels, kind)
    elif loss == "brier":
        probability = logprobs[:, 0].exp() if kind == "scaled_logratio" else _share(logprobs, kind)
        row_loss = (probability - labels) ** 2
    elif loss == "mse":
        high, low = targets
        row_loss = (_share(logprobs, kind) - (low + (high - low) * labels)) ** 2
    elif loss == "margin":
        scores = readout_scores(logprobs, kind=kind, beta=beta, ref_logprob=ref_logprob, targets=targets)
        row_loss = (margin - (2.0 * labels - 1.0) * (2.0 * scores - 1.0)).clamp(min=0.0)
    else:
        raise ValueError(f"laser.readouts loss is {loss!r}; expected mse, brier, bce or margin")
    return weighted_mean(row_loss, right, class_weights, count)


def group_shrunk_labels(rewards: Tensor, group_ids: Tensor, *, gamma: float) -> Tensor:
    """gamma * reward + (1 - gamma) * mean reward of the sample's group, [samples] float64 (CREDO's target)."""
    ids, index = torch.unique(group_ids, return_inverse=True)
    values = rewards.double()
    sums = values.new_zeros(ids.numel()).index_add_(0, index, values)
    counts = values.new_zeros(ids.numel()).index_add_(0, index, torch.ones_like(values))
    return gamma * values + (1.0 - gamma) * (sums / counts)[index]


def _share(logprobs: Tensor, kind: ScoreKind) -> Tensor:
    """The first token's share of the probability of all of them, [points]."""
    logprobs = at_least_float32(logprobs)
    if kind == "pair_sigmoid":
        return torch.sigmoid(logprobs[:, 0] - logprobs[:, 1])
    return (logprobs[:, 0] - logprobs.logsumexp(dim=1)).exp()


def _cross_entropy(logprobs: Tensor, labels: Tensor, kind: ScoreKind) -> Tensor:
    if kind == "scaled_logratio":
        return -(labels * logprobs[:, 0] + (1.0 - labels) * logprobs[:, 1])
    if kind == "pair_sigmoid":
        difference = logprobs[:, 0] - logprobs[:, 1]
        log_share, log_rest = (torch.nn.functional.logsigmoid(x) for x in (difference, -difference))
    else:
        total = logprobs.logsumexp(dim=1)
        log_share, log_rest = logprobs[:, 0] - total, logprobs[:, 1:].logsumexp(dim=1) - total
    return -(labels * log_share + (1.0 - labels) * log_rest)


def _check(logprobs: Tensor, kind: ScoreKind) -> None:
    least = 1 if kind == "scaled_logratio" else 2
    if (
        logprobs.dim() != 2
        or logprobs.shape[1] < least
        or (kind == "pair_sigmoid" and logprobs.shape[1] != 2)
    ):
        raise ValueError(
            f"log-probs are {tuple(logprobs.shape)} for the score {kind}; expected [points, tokens] with "
            f"{'2' if kind == 'pair_sigmoid' else f'at least {least}'} tokens"
        )
