"""Joining a run and leaving it: process groups, coordinator and watchdog around everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_laser.config.schema import RunConfig
from megatron_laser.observability.timers import Timers
from megatron_laser.trainer import runtime as runtimes
from megatron_laser.trainer.coordinator import Coordinator
from megatron_laser.trainer.machine import check_machine
from megatron_laser.trainer.runtime import Runtime


@contextmanager
def session(config: RunConfig, timers: Timers) -> Iterator[tuple[Runtime, Coordinator]]:
    """Join the run on this rank; an error inside is told to the other ranks before it goes on.

    Raises ConfigError, on every rank, when any rank's machine cannot run `config`.
    """
    runtime = runtimes.start(config)
    coordinator = Coordinator(
        runtime.store,
        runtime.rank,
        runtime.world_size,
        deadline=config.run.deadline,
        detail=lambda: "" if timers.current == "total" else timers.current,
    )
    coordinator.start_watchdog()
    try:
        with coordinator.phase("checking the machine"):
            check_machine(config, runtime)
        yield runtime, coordinator
    except BaseException as error:
        coordinator.fail(error)
        if runtime.world_size == 1:  # else leaving the groups would wait for ranks that may be gone
            runtimes.stop()
        raise
    coordinator.close()
    runtimes.stop()
