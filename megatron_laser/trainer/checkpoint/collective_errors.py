"""File work that all ranks do together: if it fails on one, it fails on all, and with the same message."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_laser.trainer.checkpoint.folder import CheckpointError

T = TypeVar("T")


def on_every_rank(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run `work` on every rank; if it fails on one, every rank raises instead of waiting for it."""
    trouble: Exception | None = None
    try:
        result = work()
    except Exception as error:
        trouble = error
    troubles = gathered_errors(trouble, group)
    if troubles:
        raise CheckpointError("; ".join(troubles)) from trouble
    return result


def gathered_errors(error: Exception | None, group: dist.ProcessGroup | None) -> list[str]:
    """What went wrong on any rank, each message once."""
    troubles: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(troubles, None if error is None else reason(error), group=group)
    return list(dict.fromkeys(text for text in troubles if text))


def reason(error: BaseException) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"
