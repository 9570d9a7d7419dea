"""The last-token self-reward: its score, its loss, and the condition under which both mean what they say.

Source: "LaSeR: Reinforcement Learning with Last-Token Self-Rewarding", arXiv 2510.14943, section 3.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_laser.algorithms.numerics import at_least_float32

SelfRewardLossKind = Literal["mse", "bce"]

# 1 - pi(z_c) cannot be told from 0 in float32 below this; the cross-entropy of a wrong answer stays finite.
_SMALLEST_COMPLEMENT = 1e-6


def self_reward_scores(
    zc_logprobs: Tensor,
    *,
    ref_logprob: float | Tensor,
    beta: float,
    targets: tuple[float, float] = (1.0, 0.0),
) -> Tensor:
    """r_s = beta * (log pi(z_c | x, y, EOS) - c_ref), on the scale of its targets.

    With targets (a, b) it is (beta * (log pi - c_ref) - b) / (a - b), so that 1 is what a right response is trained
    towards and 0 what a wrong one is. Whatever reads a score (the clamp to [0, 1], the decision at 0.5, votes,
    calibration, reports) relies on that, and nothing but this function and the loss knows `laser.targets`.

    Args:
        zc_logprobs: [samples], log-probability of the score token at the EOS position, of the raw logits
            (temperature 1).
        ref_logprob: c_ref in nats: a constant, or [samples] from a reference model.
        beta: beta_v, > 0.
        targets: `laser.targets`, (right, wrong). Left out, the score is r_s itself, of which the loss is.

    Returns:
        [samples], at least float32, differentiable in `zc_logprobs`. About 1 for right and 0 for wrong.

    Raises:
        ValueError: `beta` is not positive, or the right target not above the wrong one.
    """
    _check_beta(beta)
    right, wrong = targets
    if not right > wrong:
        raise ValueError(
            f"laser.targets is [{right:g}, {wrong:g}]; expected [right, wrong] with right above wrong"
        )
    raw = beta * (at_least_float32(zc_logprobs) - ref_logprob)
    return raw if (right, wrong) == (1.0, 0.0) else (raw - wrong) / (right - wrong)


def class_weights(num_correct: int, num_incorrect: int) -> tuple[float, float]:
    """(w_correct, w_incorrect) = (N / 2N_c, N / 2N_i), so that both classes weigh N/2 in the loss.

    The counts are those of the scored samples of the *global* batch of one optimizer step. The weight of a
    class without samples is never used, and is 0.
    """
    for name, count in (("num_correct", num_correct), ("num_incorrect", num_incorrect)):
        if count < 0:
            raise ValueError(f"{name} is {count}; expected the number of scored samples, 0 or more")
    total = num_correct + num_incorrect
    return (
        total / (2 * num_correct) if num_correct else 0.0,
        total / (2 * num_incorrect) if num_incorrect else 0.0,
    )


def self_reward_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    class_weights: tuple[float, float],
    num_scored: int,
    targets: tuple[float, float] = (1.0, 0.0),
    kind: SelfRewardLossKind = "mse",
    ref_logprob: float | Tensor | None = None,
    beta: float | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """This rank's, this micro-batch's part of L_sr: a sum over its rows divided by the global count.

    Parts add up to the loss of the whole batch however it is cut. Rows are the scored samples only: a
    truncated or aborted response has no row here.

    Args:
        scores: [rows], from `self_reward_scores` without its targets. No rows give a zero that still has a gradient.
        labels: [rows], the verifier's r_v, 1 right or 0 wrong.
        class_weights: (w_correct, w_incorrect); (1.0, 1.0) turns the weights off.
        num_scored: N, scored samples in the global batch of the optimizer step.
        targets: the score asked of a (right, wrong) response; "mse" only.
        kind: "mse", the paper's w * (r_s - target)^2, or "bce", the ablation that the paper reports to hurt:
            w times the binary cross-entropy of pi(z_c) against the label.
        ref_logprob, beta: what the scores were made with; "bce" needs them to recover pi(z_c) from the score.
        right: [rows] bool, the class that weights a row, where labels are not 1 and 0; None: labels above 1/2.

    Returns:
        Scalar, at least float32.

    Raises:
        ValueError: shapes differ, `num_scored` is smaller than the rows given, or "bce" lacks what it needs.
    """
    if scores.dim() != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} must both be [rows]: "
            "pass one entry for each scored sample"
        )
    if num_scored < scores.numel():
        raise ValueError(
            f"num_scored is {num_scored} but {scores.numel()} rows were given; expected the number of scored "
            "samples in the global batch (all ranks, all micro-batches)"
        )
    scores = at_least_float32(scores)
    labels = labels.to(scores.dtype)
    if kind == "mse":
        target_right, target_wrong = targets
        row_loss = (scores - (target_wrong + (target_right - target_wrong) * labels)) ** 2
    elif kind == "bce":
        row_loss = _score_token_cross_entropy(scores, labels, targets, ref_logprob, beta)
    else:
        raise ValueError(f"laser.loss is {kind!r}; expected 'mse' or 'bce'")
    return weighted_mean(row_loss, labels > 0.5 if right is None else right, class_weights, num_scored)


def weighted_mean(row_loss: Tensor, right: Tensor, class_weights: tuple[float, float], count: int) -> Tensor:
    """Sum of row_loss [rows] times its class's weight, divided by `count`, the rows of the global batch."""
    weight_correct, weight_incorrect = class_weights
    weights = torch.full_like(row_loss, weight_incorrect).masked_fill(right, weight_correct)
    return (weights * row_loss).sum() / max(count, 1)


def partition_excess(ref_logprob: float, beta: float, *, target: float = 1.0) -> float:
    """Z - 1 = pi_ref(z_c) * (exp(target / beta) - 1), by how much the score's normaliser is not 1.

    The score drops beta * log Z from the closed form of the KL-regularised verification objective, which is
    harmless only while Z - 1 is far below 1. A large value also says that a right answer is asked for a
    probability of z_c that disturbs the policy. Where the exponential overflows the result is infinity.

    Args:
        ref_logprob: c_ref in nats, <= 0.
        beta: beta_v, > 0.
        target: the score asked of a right response.
    """
    _check_beta(beta)
    if not ref_logprob <= 0:
        raise ValueError(f"laser.ref_logprob is {ref_logprob}; expected a log-probability, 0 or less")
    gain = target / beta
    if gain <= 0:
        return math.exp(ref_logprob) * math.expm1(gain)
    # log(e^gain - 1) = gain + log(1 - e^-gain): the two large exponents cancel before anything overflows.
    log_excess = ref_logprob + gain + math.log(-math.expm1(-gain))
    try:
        return math.exp(log_excess)
    except OverflowError:
        return math.inf


def _score_token_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    targets: tuple[float, float],
    ref_logprob: float | Tensor | None,
    beta: float | None,
) -> Tensor:
    if ref_logprob is None or beta is None:
        raise ValueError(
            "laser.loss is 'bce', which needs pi(z_c): "
            "pass the ref_logprob and beta that the scores were made with"
        )
    if tuple(targets) != (1.0, 0.0):
        raise ValueError(
            f"laser.targets is {list(targets)} with laser.loss 'bce', whose labels are always [1.0, 0.0]; "
            "remove laser.targets or set laser.loss to 'mse'"
        )
    _check_beta(beta)
    logprobs = scores / beta + ref_logprob
    # The bound moves the value, not the gradient: a saturated wrong answer must still be pushed down.
    bounded = logprobs + (logprobs.clamp(max=-_SMALLEST_COMPLEMENT) - logprobs).detach()
    return -(labels * logprobs + (1.0 - labels) * _log1mexp(bounded))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= -1e-6, accurate in value and gradient at both ends (Maechler 2012)."""
    return torch.where(x > -math.log(2.0), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"laser.beta is {beta}; expected a positive number (the paper uses 0.1)")
