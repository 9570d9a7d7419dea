"""How many bytes of probabilities one log-prob call may keep for its backward: as set, or chosen once a process.

What is kept is rounded otherwise than what is recomputed, so that the number is part of a run's bits. It is
therefore looked up once, at the first call that has a backward, and stays; only running out of memory lowers it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_laser.logprob_memory import GIB, KEEP_CPU_BYTES, choose_keep_budget
from megatron_laser.ops.collectives import group_size
from megatron_laser.ops.device import memory
from megatron_laser.ops.settings import settings

logger = logging.getLogger(__name__)

# "auto" as chosen, by device and group; and what running out of memory left of a setting, by device.
_chosen: dict[tuple[torch.device, str], int] = {}
_lowered: dict[torch.device, tuple[int | None, int]] = {}


def keep_budget(device: torch.device, group: dist.ProcessGroup | None = None) -> int:
    """Bytes that one call may keep now. A rank that ran out of memory has less than the others of its group.

    Args:
        device: where the call's tensors are.
        group: as in `agreed_keep_budget`.
    """
    agreed = agreed_keep_budget(device, group)
    setting, lowered = _lowered.get(device, (None, agreed))
    return min(agreed, lowered) if setting == settings().keep_logits_bytes else agreed


def agreed_keep_budget(
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    reader: Callable[[torch.device], tuple[int, int]] = memory,
) -> int:
    """The budget before anything ran out of memory, the same on all ranks of `group`, whose first call is collective.

    For decisions that these ranks have to take alike, because other collectives follow from them.

    Args:
        group: the ranks that share the vocabulary; "auto" is the smallest of theirs.
        reader: (free, total) bytes of a CUDA device.
    """
    given = settings().keep_logits_bytes
    if given is not None:
        return given
    if device.type != "cuda":
        return KEEP_CPU_BYTES
    key = (device, "" if group is None or group_size(group) == 1 else group.group_name)
    if key not in _chosen:
        free, total = reader(device)
        later = settings().reserved_bytes
        chosen = choose_keep_budget(free - later, total)
        if key[1]:
            smallest = torch.tensor(chosen, device=device)
            dist.all_reduce(smallest, dist.ReduceOp.MIN, group)
            chosen = int(smallest.item())
        _chosen[key] = chosen
        logger.info(
            "log-prob op: a call may keep %s of probabilities for its backward on %s: %s of %s are free, %s of "
            "that promised to others%s; fixed for this process",
            *(_gib(chosen), device, _gib(free), _gib(total), _gib(later)),
            f", and it is the least of {group_size(group)} ranks" if key[1] else "",
        )
    return _chosen[key]


def shrink_keep_budget(device: torch.device, nbytes: int) -> None:
    """Keep at most `nbytes` in later calls on `device`, after more ran out of memory; until the setting changes.

    The first time on a device it warns, with the number to set for a run that repeats bit for bit.
    """
    setting = settings().keep_logits_bytes
    known = _lowered.get(device)
    if known is not None and known[0] == setting:
        _lowered[device] = (setting, min(known[1], nbytes))
        return
    _lowered[device] = (setting, nbytes)
    logger.warning(
        "log-prob op: out of memory on %s while keeping probabilities for the backward; from here on a call keeps "
        "at most %s and recomputes the rest. What is recomputed is rounded otherwise: for a run that repeats bit "
        "for bit set model.keep_logits_gib: %s",
        *(device, _gib(nbytes), repr(nbytes / GIB)),
    )


def forget_keep_budgets() -> None:
    """As in a new process: the next call looks again. For benchmarks and tests."""
    _chosen.clear()
    _lowered.clear()


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
