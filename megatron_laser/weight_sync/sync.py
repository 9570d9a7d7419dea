"""Moving the trained weights into the engine after a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from megatron_laser.rollout.engine import RolloutEngine


def sync_weights(
    stream: Iterable[tuple[str, torch.Tensor]], engine: RolloutEngine | None, version: int
) -> None:
    """Feed `stream` to the engine on rank 0; take part in its collectives on the other ranks.

    Args:
        stream: the trainer's `weight_stream()`. Every rank must pass its own and call this function.
        engine: None on ranks without one.
        version: the step whose weights these are.

    Raises:
        RuntimeError: the engine does not report `version` afterwards.
    """
    if engine is None:
        deque(stream, maxlen=0)  # gathers are collectives: all ranks must run them
        return
    engine.update_weights(stream, version)
    if engine.version != version:
        raise RuntimeError(
            f"weight sync: the engine reports version {engine.version} after an update to {version}; "
            "its rollouts would come from other weights than the trainer's"
        )
