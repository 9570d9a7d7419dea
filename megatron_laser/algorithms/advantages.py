"""Advantages: from the verifier's rewards (`ESTIMATORS`), from the self-reward scores, and their mixture.

Samples may come in any order and groups may have any ids and sizes. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Unscored = Literal["zero", "exclude"]

_EPSILON = 1e-6  # added to the standard deviation of the rewards, as in GRPO


@dataclass(frozen=True)
class AdvantageBatch:
    """What a user's function of advantages is given: the whole rollout batch, the same on every rank; all [samples].

    rewards: float64, the verifier's, with the terms for length (`policy.overlong_penalty`, `policy.length_penalty`).
    labels: float64, the verifier's alone. group_ids: int64, equal for the responses to one prompt. lengths: int64,
    sampled tokens. scored: bool, whether the response has a self-reward score; scores: float64, on the scale of its
    targets (1 right, 0 wrong), NaN where there is none. advantages: float64, what the steps before this one made.
    """

    rewards: Tensor
    labels: Tensor
    group_ids: Tensor
    lengths: Tensor
    scores: Tensor
    scored: Tensor
    advantages: Tensor


class _GroupStatistics(NamedTuple):
    """Per sample, of the sample's group."""

    deviation: Tensor  # value minus the group's mean
    std: Tensor  # unbiased; 0 for fewer than two members
    count: Tensor  # members
    index: Tensor  # dense group number
    num_groups: int


def grpo_advantages(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = True) -> Tensor:
    """A_v = (r - mean) / (std + 1e-6) over the sample's group (GRPO, arXiv 2402.03300), std unbiased.

    A group of one, and a group whose rewards are all equal, get exactly 0.

    Args:
        rewards: [samples], every sample graded.
        group_ids: [samples] int64, the same number for all responses to one prompt.
        normalize_std: False leaves the division out (Dr. GRPO, arXiv 2503.20783).

    Returns:
        [samples] float32.
    """
    group = _reward_groups(rewards, group_ids)
    advantages = group.deviation / (group.std + _EPSILON) if normalize_std else group.deviation
    return advantages.float()


def dr_grpo_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_v = r - mean over the sample's group (Dr. GRPO, arXiv 2503.20783): no division, [samples] float32.

    Its other half, the constant divisor of the token sum, is `policy.loss_aggregation: constant_length`.
    """
    return grpo_advantages(rewards, group_ids, normalize_std=False)


def rloo_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_v = r - mean of the *other* responses of the group (RLOO, arXiv 2402.14740), [samples] float32.

    With n responses that is n / (n - 1) times the deviation from the group's mean; a group of one gets 0.
    """
    group = _reward_groups(rewards, group_ids)
    return (group.deviation * group.count / (group.count - 1.0).clamp(min=1.0)).float()


def reinforce_pp_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """REINFORCE++ with baseline (arXiv 2501.03262): r minus the group's mean, normalised over the batch.

    d = r - mean(group); A_v = (d - mean(batch of d)) / (std(batch of d) + 1e-6), std unbiased. The batch is
    the whole rollout batch and every response counts once, whatever its length. When every group has one
    member there is no group baseline: d = r, which is plain REINFORCE++. A batch without any spread gets
    exactly 0. Returns [samples] float32.
    """
    group = _reward_groups(rewards, group_ids)
    alone = bool((group.count <= 1).all())
    centred = rewards.double() if alone else group.deviation
    batch = _group_statistics(centred, torch.zeros_like(group_ids))
    return (batch.deviation / (batch.std + _EPSILON)).float()


# `policy.advantage`: name -> A_v of (rewards [samples], group_ids [samples]), [samples] float32.
ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce_pp": reinforce_pp_advantages,
}


def verifier_advantages(
    rewards: Tensor, group_ids: Tensor, *, estimator: str, normalize_std: bool = True
) -> Tensor:
    """A_v of every sample by `policy.advantage`, [samples] float32; `normalize_std` is for `grpo` only.

    Args:
        rewards: [samples], every sample graded.
        group_ids: [samples] int64.
        estimator: a name of `ESTIMATORS`.

    Raises:
        ValueError: a reward is not finite, shapes differ, or the estimator is unknown.
    """
    if estimator == "grpo" and not normalize_std:
        estimator = "dr_grpo"
    if estimator not in ESTIMATORS:
        *names, last = ESTIMATORS
        raise ValueError(f"policy.advantage is {estimator!r}; expected {', '.join(names)} or {last}")
    return ESTIMATORS[estimator](rewards, group_ids)


def self_reward_advantages(
    scores: Tensor,
    scored: Tensor,
    group_ids: Tensor,
    verifier_advantages: Tensor,
    *,
    std_threshold: float,
    unscored: Unscored = "zero",
) -> Tensor:
    """A_s = (s - mean) / std over the sample's group, with s = clamp(r_s, 0, 1) and std unbiased.

    A group whose std is at most `std_threshold` takes the verifier's advantages instead: its scores do not
    tell its responses apart.

    Args:
        scores: [samples], r_s from the *old* policy's zc_logprob; ignored where not scored (NaN is fine).
        scored: [samples] bool, whether the response ended with EOS by itself.
        group_ids: [samples] int64.
        verifier_advantages: [samples], A_v by any estimator.
        std_threshold: T, >= 0.
        unscored: "zero" counts a response without a score as s = 0, in the statistics and for itself;
            "exclude" leaves it out of the statistics and gives it its verifier advantage.

    Returns:
        [samples] float32.
    """
    _check_samples(scores=scores, scored=scored, group_ids=group_ids, verifier_advantages=verifier_advantages)
    group, uses_scores = _score_groups(scores, scored, group_ids, std_threshold, unscored)
    # Where the verifier's advantage is used the std may be 0; 1 stands in for it.
    normalized = group.deviation / torch.where(uses_scores, group.std, 1.0)
    if unscored == "exclude":
        uses_scores = uses_scores & scored.bool()
    return torch.where(uses_scores, normalized, verifier_advantages.double()).float()


def mix_advantages(verifier_advantages: Tensor, self_advantages: Tensor, *, tau: float) -> Tensor:
    """A = (1 - tau) * A_v + tau * A_s, [samples] float32. Where the two agree, A is exactly that value."""
    _check_samples(verifier_advantages=verifier_advantages, self_advantages=self_advantages)
    if not 0.0 <= tau <= 1.0:
        raise ValueError(f"laser.tau is {tau}; expected a number from 0 to 1")
    verifier = verifier_advantages.double()
    return (verifier + tau * (self_advantages.double() - verifier)).float()


def discrepancy_advantages(
    advantages: Tensor,
    scores: Tensor,
    scored: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    *,
    kappa: float,
    bounds: tuple[float, float],
) -> Tensor:
    """Advantages times w = clip(1 + kappa (d - mean of d over the group), low, high), d = |reward - clamp(score)|.

    Responses whose score disagrees with the verifier count more (CREDO's answer weights). A response without a score
    keeps its advantage and takes no part in the mean.

    Args:
        advantages, rewards: [samples]. scores, scored, group_ids: as in `self_reward_advantages`.
        kappa: >= 0. bounds: (low, high) with 0 <= low <= 1 <= high.

    Returns:
        [samples] float32.
    """
    _check_samples(advantages=advantages, scores=scores, scored=scored, rewards=rewards, group_ids=group_ids)
    low, high = bounds
    if not (kappa >= 0 and 0.0 <= low <= 1.0 <= high):
        raise ValueError(
            f"kappa is {kappa} and its bounds [{low}, {high}]; expected 0 or more, and low <= 1 <= high"
        )
    clamped = _clamped_scores(scores, scored)
    distance = (rewards.double() - clamped).abs()
    group = _group_statistics(torch.where(scored.bool(), distance, 0.0), group_ids, members=scored.bool())
    weight = (1.0 + kappa * group.deviation).clamp(low, high)
    return (advantages.double() * torch.where(scored.bool(), weight, 1.0)).float()


def groups_mixed(
    scores: Tensor,
    scored: Tensor,
    group_ids: Tensor,
    *,
    std_threshold: float,
    unscored: Unscored = "zero",
) -> float:
    """The share of groups whose scores pass `std_threshold`, so that A_s is used; 0 without any group."""
    _check_samples(scores=scores, scored=scored, group_ids=group_ids)
    group, uses_scores = _score_groups(scores, scored, group_ids, std_threshold, unscored)
    return _share_of_groups(uses_scores, group)


def groups_uniform(rewards: Tensor, group_ids: Tensor) -> float:
    """The share of groups whose rewards are all equal (their A_v is 0); 0 without any group."""
    _check_samples(rewards=rewards, group_ids=group_ids)
    group = _group_statistics(rewards.double(), group_ids)
    return _share_of_groups(group.std == 0, group)


def _reward_groups(rewards: Tensor, group_ids: Tensor) -> _GroupStatistics:
    _check_samples(rewards=rewards, group_ids=group_ids)
    if not bool(torch.isfinite(rewards).all()):
        bad = int((~torch.isfinite(rewards)).nonzero()[0])
        raise ValueError(
            f"rewards[{bad}] is {float(rewards[bad])}; expected a finite number: grade every sample first"
        )
    return _group_statistics(rewards.double(), group_ids)


def _score_groups(
    scores: Tensor, scored: Tensor, group_ids: Tensor, std_threshold: float, unscored: Unscored
) -> tuple[_GroupStatistics, Tensor]:
    """Statistics of the clamped scores, and per sample whether its group uses them."""
    if unscored not in ("zero", "exclude"):
        raise ValueError(f"laser.unscored is {unscored!r}; expected 'zero' or 'exclude'")
    if not std_threshold >= 0:
        raise ValueError(f"laser.std_threshold is {std_threshold}; expected 0 or more")
    scored = scored.bool()
    clamped = _clamped_scores(scores, scored)
    group = _group_statistics(clamped, group_ids, members=scored if unscored == "exclude" else None)
    return group, group.std > std_threshold


def _clamped_scores(scores: Tensor, scored: Tensor) -> Tensor:
    """clamp(score, 0, 1), [samples] float64, 0 where there is none."""
    missing = scored.bool() & torch.isnan(scores)
    if bool(missing.any()):
        bad = int(missing.nonzero()[0])
        raise ValueError(f"scores[{bad}] is NaN although the sample is scored: its zc_logprob is missing")
    return torch.where(scored.bool(), scores.double().clamp(0.0, 1.0), 0.0)


def _group_statistics(values: Tensor, group_ids: Tensor, members: Tensor | None = None) -> _GroupStatistics:
    """Mean and unbiased std over the `members` ([samples] bool, None for all) of each sample's group."""
    ids, index = torch.unique(group_ids, return_inverse=True)
    included = torch.ones_like(values) if members is None else members.to(values.dtype)

    def per_group(x: Tensor) -> Tensor:
        return x.new_zeros(ids.numel()).index_add_(0, index, x * included)

    # Measured from the smallest member, equal values have a deviation of exactly 0, not of a rounding error.
    lowest = values.new_full((ids.numel(),), torch.inf)
    lowest.scatter_reduce_(0, index, torch.where(included > 0, values, torch.inf), reduce="amin")
    shifted = values - torch.where(torch.isinf(lowest), 0.0, lowest)[index]
    count = per_group(torch.ones_like(values))
    deviation = shifted - (per_group(shifted) / count.clamp(min=1.0))[index]
    std = (per_group(deviation**2) / (count - 1.0).clamp(min=1.0)).sqrt()
    return _GroupStatistics(deviation, std[index], count[index], index, ids.numel())


def _share_of_groups(flag: Tensor, group: _GroupStatistics) -> float:
    if group.num_groups == 0:
        return 0.0
    return group.index[flag].unique().numel() / group.num_groups


def _check_samples(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(f"all of {shapes} must have one shape [samples]: pass one entry per sample")
