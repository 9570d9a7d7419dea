"""Log-probs of few rows without a gradient: an engine's statistics, merged over the group."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_laser.ops.autograd import Problem, Reducer
from megatron_laser.ops.collectives import GatheredRows
from megatron_laser.ops.statistics import finish, reduced
from megatron_laser.ops.tiles import vocabulary_shard


def without_gradient(
    engine: Reducer,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Log-probs [rows] at temperature 1 from an engine's statistics alone."""
    shard = vocabulary_shard(weight, vocab_size, tp_group)
    labels = labels.contiguous()
    problem = Problem(GatheredRows(hidden, None), weight, labels, 1.0, shard, False)
    local, _ = engine.statistics(problem, for_backward=False)
    return finish(reduced(local, tp_group), labels, shard)[0]
