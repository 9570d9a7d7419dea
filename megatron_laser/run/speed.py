"""What rank 0 says of each step's speed: rates, MFU, who waited, and what was predicted beside what was measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megatron_laser.config import RunConfig, read_architecture
from megatron_laser.config.process_environment import place_in_run
from megatron_laser.observability.rates import Devices, idle_metrics, rate_metrics, step_work
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.run.predicting import Predictor, peaks, run_machine
from megatron_laser.trainer.forward_backward import NORM, TOTAL
from megatron_laser.trainer.trainer import StepResult
from megatron_laser.types import RolloutBatch


class Speed:
    """Asked once a step, after it; nothing that it says changes the run."""

    def __init__(self, config: RunConfig, engine: RolloutEngine | None) -> None:
        """Args: engine: None in a run in which nobody generates. Raises ConfigError: `logging.machine` is none."""
        self._config = config
        self._engine = engine
        self._architecture = read_architecture(config.model.path)
        self._ranks = place_in_run().world_size
        machine = run_machine(config)
        self._peaks = peaks(config, machine)
        self._predictor = None if machine is None else Predictor(config, machine, self._ranks)
        self._waited = 0.0
        self._known, self._busy = self._servers_so_far()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the trainer waits for a rollout in."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - started

    def metrics(
        self, batch: RolloutBatch, result: StepResult, metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Of the step that has just ended.

        Args:
            metrics: its seconds under time/, and those of the batch.
        """
        waited, self._waited = self._waited, 0.0
        work = step_work(self._config, self._architecture, batch.groups)
        devices = Devices.of(self._config, self._ranks, self._server_gpus)
        passes = self._passes(result)
        found = rate_metrics(work, devices, metrics, passes=passes, peaks=self._peaks)
        if self._predictor is not None:
            found |= self._predictor.metrics(
                batch,
                metrics,
                server_gpus=devices.all - devices.trainer,
                whole=passes == self._config.policy.epochs,
            )
        return found | idle_metrics(metrics, waited=waited, busy=self._busy_seconds())

    @property
    def _server_gpus(self) -> int:
        return self._engine.num_gpus if isinstance(self._engine, SglangEngine) else 0

    def _servers_so_far(self) -> tuple[float, float]:
        return self._engine.busy_seconds if isinstance(self._engine, SglangEngine) else (0.0, 0.0)

    def _busy_seconds(self) -> float | None:
        """Of the servers since the last call, mean over them; None: nothing is known of that time."""
        (known, busy), before, busy_before = self._servers_so_far(), self._known, self._busy
        self._known, self._busy = known, busy
        return busy - busy_before if known > before else None

    def _passes(self, result: StepResult) -> float:
        """How often the optimizer went through the batch: a step may be given up before it is computed."""
        policy = self._config.policy
        computed = sum(not update.bad or bool({TOTAL, NORM} & set(update.bad)) for update in result.updates)
        return min(policy.epochs, computed / policy.minibatches)
