"""Which rank is slow: seconds per phase of all ranks, compared now and then."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_laser.distributed.runtime import Runtime
from megatron_laser.model import platform
from megatron_laser.observability.timers import Timers
from megatron_laser.trainer.policy import Policy

logger = logging.getLogger(__name__)

RATIO = 1.2  # a rank that takes this many times the median is worth a line
_WORTH = 0.5  # seconds over the median; below it the ratio is noise
_TRAIN, _REDUCE = "time/train", "time/reduce"
_COMPARED = ("time/logprob", _TRAIN, "time/sync", "time/checkpoint")


class Stragglers:
    """Adds up this rank's seconds and compares them with the others' every `every` steps."""

    def __init__(self, runtime: Runtime, every: int) -> None:
        """Args: every: 0 never compares."""
        self._runtime = runtime
        self._every = every if runtime.world_size > 1 else 0
        self._seconds: dict[str, float] = {}

    def add(self, step: int, times: Mapping[str, float]) -> dict[str, float]:
        """Count one step; on every rank, with `Timers.collect()`'s result. A collective every `every` steps.

        Returns:
            After a comparison straggler/<phase>, see `straggler_metrics`; {} in other steps.
        """
        for phase in (*_COMPARED, _REDUCE):
            self._seconds[phase] = self._seconds.get(phase, 0.0) + times.get(phase, 0.0)
        if not self._every or step % self._every:
            return {}
        # In the gradient reduction the quick ranks wait for the slow one; what is before it is a rank's own work.
        own = {phase: self._seconds[phase] for phase in _COMPARED}
        own[_TRAIN] -= self._seconds[_REDUCE]
        self._seconds.clear()
        gathered: list[Any] = [None] * self._runtime.world_size
        dist.all_gather_object(gathered, own, group=self._runtime.cpu_group)
        line = slow_ranks(gathered, self._every)
        if line is not None and self._runtime.is_main:
            logger.warning("%s", line)
        return straggler_metrics(gathered)


def straggler_metrics(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """straggler/<phase>: the slowest rank's seconds over the median of all; phases that take no time are left out.

    Args:
        seconds: for each rank, {"time/<phase>": seconds}.
    """
    metrics = {}
    for phase in seconds[0]:
        values = [rank[phase] for rank in seconds]
        median = statistics.median(values)
        if median > 0.0:
            metrics[f"straggler/{phase.removeprefix('time/')}"] = max(values) / median
    return metrics


def slow_ranks(seconds: Sequence[Mapping[str, float]], steps: int) -> str | None:
    """One line on the phases whose slowest rank takes over RATIO x the median; None when all are even.

    Args:
        seconds: for each rank, {"time/<phase>": seconds over `steps` steps}.
    """
    found = []
    for phase in seconds[0]:
        values = [rank[phase] for rank in seconds]
        median, slowest = statistics.median(values), max(values)
        if slowest > RATIO * median and slowest > median + _WORTH:
            found.append(
                f"{phase.removeprefix('time/')} rank {values.index(slowest)}: {slowest:.2f} s, "
                f"median {median:.2f} s"
            )
    return f"slow ranks over the last {steps} steps: {'; '.join(found)}" if found else None


def time_reductions(policy: Policy, timers: Timers) -> None:
    """Count the gradient reduction as a phase of its own, `time/reduce`, inside `time/train`."""
    reduce: Callable[..., None] = policy.chunks.config.finalize_model_grads_func

    def timed(*args: Any, **kwargs: Any) -> None:
        platform.synchronize()  # the host runs ahead of the device, whose work belongs to the phase before
        with timers("reduce"):
            reduce(*args, **kwargs)

    policy.chunks.config.finalize_model_grads_func = timed
