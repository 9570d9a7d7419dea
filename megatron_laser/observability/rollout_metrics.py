"""What a graded rollout says about the policy and about its self-reward score, as flat metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_laser.algorithms.advantages import groups_uniform
from megatron_laser.algorithms.metrics import verification_metrics
from megatron_laser.rewards import OUTCOMES
from megatron_laser.types import Group, RolloutBatch

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def rollout_metrics(batch: RolloutBatch, zc_logprobs: torch.Tensor, scores: torch.Tensor) -> dict[str, Any]:
    """Metrics of one step's batch.

    Args:
        zc_logprobs, scores: [samples] of the policy that generated the batch; NaN where there is no score.

    Returns:
        Flat names; the score's metrics are left out when no sample has a score. Where there are several sources, the
        same of each under source/<name>/; what it has no graded response for is left out.
    """
    metrics = _metrics(batch.groups, zc_logprobs, scores)
    source_of = [group.prompt.source for group in batch.groups for _ in group.samples]
    for name in sorted({group.prompt.source for group in batch.groups} - {""}):
        groups = [group for group in batch.groups if group.prompt.source == name]
        mine = torch.tensor([source == name for source in source_of], dtype=torch.bool)
        if not bool(mine.any()):
            continue
        found = _metrics(groups, zc_logprobs[mine], scores[mine])
        metrics |= {f"source/{name}/{metric}": value for metric, value in found.items()}
    return metrics


def _metrics(groups: Sequence[Group], zc_logprobs: torch.Tensor, scores: torch.Tensor) -> dict[str, Any]:
    samples = [sample for group in groups for sample in group.samples]
    group_ids = [index for index, group in enumerate(groups) for _ in group.samples]
    rewards = np.array([sample.reward for sample in samples])
    lengths = np.array([len(sample.generation.response_ids) for sample in samples])
    outcomes = Counter(sample.outcome for group in groups for sample in (*group.samples, *group.ungraded))
    metrics: dict[str, Any] = {
        "reward_mean": rewards.mean(),
        "reward_std": rewards.std(),
        "response_length_mean": lengths.mean(),
        "truncated_fraction": np.mean([sample.generation.finish_reason != "stop" for sample in samples]),
        "scored_fraction": np.mean([sample.scored for sample in samples]),
        "groups_uniform_fraction": groups_uniform(
            torch.from_numpy(rewards), torch.tensor(group_ids, dtype=torch.int64)
        ),
        **{f"outcome/{name}": outcomes.get(name, 0) for name in OUTCOMES},
    }
    return metrics | score_metrics(zc_logprobs, scores, torch.from_numpy(rewards))


def scores_by_label(batch: RolloutBatch, scores: torch.Tensor) -> dict[str, list[float]]:
    """The scores of right and of wrong responses, as histograms want them; empty lists where there are none."""
    right: list[float] = []
    wrong: list[float] = []
    for sample, score in zip(batch.samples(), scores.tolist(), strict=True):
        if score == score:  # NaN: not scored
            (right if sample.reward > 0.5 else wrong).append(score)
    return {"score/right": right, "score/wrong": wrong}


def score_metrics(zc_logprobs: torch.Tensor, scores: torch.Tensor, rewards: torch.Tensor) -> dict[str, Any]:
    """How well the self-reward score tells right from wrong; {} when no sample has a score."""
    known = ~torch.isnan(scores)
    if not bool(known.any()):
        return {}
    values, labels = scores[known].double(), rewards[known] > 0.5
    verification = verification_metrics(values, labels.double())._asdict()
    metrics = {f"self_reward_{name}": value for name, value in verification.items()}
    metrics["zc_logprob_mean"] = float(zc_logprobs[known].double().mean())
    metrics["zc_logprob_max"] = float(zc_logprobs[known].max())
    for name, part in (("right", values[labels]), ("wrong", values[~labels])):
        if len(part):
            metrics[f"score_{name}_mean"] = float(part.mean())
            metrics[f"score_{name}_std"] = float(part.std(correction=0))
            metrics[f"score_quantiles_{name}"] = np.quantile(part.numpy(), _QUANTILES).tolist()
    return metrics
