"""The spans of all ranks' phases, gathered on rank 0 every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_laser.distributed.runtime import Runtime
from megatron_laser.observability.timeline import Span, TimelineFile, joined
from megatron_laser.observability.timers import Timers


class Timeline:
    """Takes each step's spans from the timers; rank 0 writes those of all ranks."""

    def __init__(
        self,
        runtime: Runtime,
        timers: Timers,
        folder: Path,
        *,
        every: int,
        last_step: int,
        servers: Callable[[], Iterable[tuple[str, float, float]]] = list,
    ) -> None:
        """
        Args:
            every: 0 writes nothing. last_step: of the checkpoint that the run goes on from.
            servers: on rank 0, when each server worked since the last call: (url, start, end) by the timers' clock.
        """
        self._runtime = runtime
        self._timers = timers
        self._every = every
        self._servers = servers
        # Also with 0: what an earlier start wrote of steps that are done again is not theirs.
        self._file = TimelineFile(folder, last_step=last_step) if runtime.is_main else None

    def add(self, step: int) -> None:
        """After a step; on every rank. A gather of some 30 bytes a span every `every` steps."""
        zero, spans = self._timers.take_spans("total")
        busy = list(self._servers())
        if not self._every or step % self._every:
            return
        own = [(phase, round(start, 4), round(end, 4)) for phase, start, end in joined(spans)]
        gathered: list[Any] | None = [own]
        if self._runtime.world_size > 1:
            gathered = [None] * self._runtime.world_size if self._runtime.is_main else None
            dist.gather_object(own, gathered, dst=0, group=self._runtime.cpu_group)
        if self._file is not None and gathered is not None:
            found = {f"rank {rank}": own for rank, own in enumerate(gathered)}
            self._file.add(step, found | _of_servers(busy, zero))


def _of_servers(busy: list[tuple[str, float, float]], zero: float) -> dict[str, list[Span]]:
    spans: dict[str, list[Span]] = {}
    for url, start, end in busy:
        spans.setdefault(f"server {url}", []).append(Span("generate", start - zero, end - zero))
    return {who: joined(own) for who, own in sorted(spans.items())}
