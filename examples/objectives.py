"""A policy loss, an advantage and an effect of scores of one's own: docs/objectives.md explains the three.

policy.loss: examples/objectives.py:soft_clip      policy.loss_options: {width: 0.3}
policy.advantage: examples/objectives.py:ranked
laser.readouts: [{advantages: examples/objectives.py:doubt}]
"""

import torch

from megatron_laser.algorithms.advantages import AdvantageBatch
from megatron_laser.algorithms.objectives import PolicyRows


def soft_clip(rows: PolicyRows, *, width: float = 0.2) -> torch.Tensor:
    """Each row's loss: -A width tanh((ratio - 1) / width), whose gradient fades where PPO's stops."""
    return -rows.advantages * width * torch.tanh((rows.log_ratio.exp() - 1.0) / width)


def ranked(batch: AdvantageBatch) -> torch.Tensor:
    """Each response's advantage: by which share of its group it is better, minus by which it is worse."""
    same = batch.group_ids[:, None] == batch.group_ids[None, :]
    better = torch.sign(batch.rewards[:, None] - batch.rewards[None, :]) * same
    return better.sum(dim=1) / (same.sum(dim=1) - 1).clamp(min=1)


def doubt(batch: AdvantageBatch) -> torch.Tensor:
    """Half the advantage where the score is sure of the verifier's label already, all of it elsewhere."""
    score = torch.where(batch.scored, batch.scores, 0.5).clamp(0.0, 1.0)
    sure = (batch.labels - score).abs() < 0.1
    return torch.where(sure, 0.5, 1.0) * batch.advantages
