"""What a graded rollout says about the policy and about its self-reward score, as flat metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_laser.algorithms.advantages import groups_uniform
from megatron_laser.algorithms.metrics import verification_metrics
from megatron_laser.rewards import OUTCOMES
from megatron_laser.types import Group, RolloutBatch, Sample

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
    labels = np.array([sample.reward for sample in samples])
    rewards = np.array([sample.learned_reward for sample in samples])
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
        **_environment(samples),
        **_terms(samples),
        **{f"outcome/{name}": outcomes.get(name, 0) for name in OUTCOMES},
    }
    return metrics | score_metrics(zc_logprobs, scores, torch.from_numpy(labels))


def _environment(samples: Sequence[Sample]) -> dict[str, float]:
    """The share of response tokens that no policy sampled; {} where it sampled all."""
    if all(sample.generation.sampled is None for sample in samples):
        return {}
    masks = np.concatenate([sample.generation.sampled_mask for sample in samples])
    return {"environment_tokens_fraction": 1.0 - float(masks.mean())}


def _terms(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean of each term over the responses that it applies to; {} where a reward is one number."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in (sample.terms or {}).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {f"reward/{name}": float(np.mean(values)) for name, values in sorted(found.items())}


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


class PointScores(Protocol):
    """What a readout read of a batch, see `trainer.run_readouts.ReadoutScores`."""

    @property
    def name(self) -> str:
        """Of the readout."""

    @property
    def of_responses(self) -> bool:
        """One score for each response at most."""

    @property
    def sample(self) -> NDArray[np.int64]:
        """[points]."""

    @property
    def offset(self) -> NDArray[np.int64]:
        """[points] tokens of the response before each."""

    @property
    def scores(self) -> torch.Tensor:
        """[points]."""


def readout_metrics(batch: RolloutBatch, readouts: Sequence[PointScores]) -> dict[str, Any]:
    """How well each of some readouts tells right responses from wrong ones, as `readout/<name>/...`.

    A readout without any point is left out, and so are points whose score is NaN: these are why a step was skipped,
    and its trainer says so. For scores of prefixes AUROC is also given for the points in each quarter of their
    responses, where there are some.
    """
    samples = list(batch.samples())
    rewards = np.array([sample.reward for sample in samples])
    lengths = np.array([len(sample.generation.response_ids) for sample in samples])
    metrics: dict[str, Any] = {}
    for readout in readouts:
        values = readout.scores.double().numpy()
        known = ~np.isnan(values)
        if not known.any():
            continue
        values, sample, offset = values[known], readout.sample[known], readout.offset[known]
        labels = (rewards[sample] > 0.5).astype(np.float64)
        found: dict[str, Any] = {
            "points": float(len(values)),
            **verification_metrics(values, labels)._asdict(),
        }
        for label, word in ((1.0, "right"), (0.0, "wrong")):
            if (labels == label).any():
                found[f"score_{word}_mean"] = float(values[labels == label].mean())
        quarter = offset * 4 // np.maximum(lengths[sample], 1)
        for part in range(0 if readout.of_responses else 4):
            own = quarter == part
            if own.any():
                found[f"auroc_quarter_{part + 1}"] = verification_metrics(values[own], labels[own]).auroc
        metrics |= {f"readout/{readout.name}/{key}": value for key, value in found.items()}
    return metrics
