"""Moving the trained weights into the engine after a step."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

import torch

from megatron_laser.rollout.client.errors import ServerError
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.weight_sync.control import SyncFailed

logger = logging.getLogger(__name__)


def sync_weights(
    stream: Iterable[tuple[str, torch.Tensor]], engine: RolloutEngine | None, version: int
) -> str | None:
    """Feed `stream` to the engine on rank 0; take part in its collectives on the other ranks.

    Args:
        stream: the trainer's `weight_stream()`. Every rank must pass its own and call this function.
        engine: None on ranks without one.
        version: the step whose weights these are.

    Returns:
        None, or, on rank 0, why the servers do not have the weights although another attempt may succeed: a
        server died on the way. The stream has then been run to its end, so that no rank waits in it.

    Raises:
        RuntimeError: the engine does not report `version` afterwards.
        SyncFailed: what another attempt would not mend.
        (A folder that cannot be written, with `weight_sync: disk`, is told like a server that died.)
    """
    stream = iter(stream)
    if engine is None:
        deque(stream, maxlen=0)  # gathers are collectives: all ranks must run them
        return None
    try:
        engine.update_weights(stream, version)
    except (SyncFailed, ServerError, OSError) as error:
        if isinstance(error, SyncFailed) and not error.retry:
            raise
        logger.warning("weight sync of step %d: %s", version, error)
        deque(stream, maxlen=0)
        return str(error)
    if engine.version != version:
        raise RuntimeError(
            f"weight sync: the engine reports version {engine.version} after an update to {version}; "
            "its rollouts would come from other weights than the trainer's"
        )
    return None
