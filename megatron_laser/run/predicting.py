"""The machine that a run is on, as far as it is known, and what a step was predicted to take on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from megatron_laser.config import RunConfig
from megatron_laser.config.plan.resolve import Plan, resolve_plan
from megatron_laser.model import platform
from megatron_laser.observability.best_effort import BestEffort
from megatron_laser.observability.predicted import STEP, PredictionWatch, plan_metrics
from megatron_laser.planner.assumptions import Assumptions, read_assumptions
from megatron_laser.planner.machine import Machine, read_machine
from megatron_laser.planner.phase_times import predict_step
from megatron_laser.types import RolloutBatch

logger = logging.getLogger(__name__)

# As torch names them. Others of the same chip (PCIe, NVL) have another peak.
_DEVICES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200"}
_SHARE = 0.01  # of the steps' time that may be spent on predictions


def run_machine(config: RunConfig) -> Machine | None:
    """The machine of `logging.machine`, or the one that this process's CUDA device is known by; None: unknown.

    Raises:
        ConfigError: there is no such machine, its file is wrong, or it does not say what it computes in `model.dtype`.
    """
    named = config.logging.machine
    if named is None:
        known = _DEVICES.get(platform.device_name())
        return None if known is None else read_machine(known)
    machine = read_machine(named)
    machine.flops(config.model.dtype)
    own = platform.device().type
    if machine.device != own:
        logger.warning(
            "logging.machine %s is of device %s, and this run computes on %s: there is no mfu/ and no plan/ in "
            "metrics.jsonl",
            named,
            machine.device,
            own,
        )
        return None
    return machine


def peaks(config: RunConfig, machine: Machine | None) -> tuple[float, float] | None:
    """FLOP/s of a trainer's and of a server's GPU; of servers with quantized weights in FP8 where that is known."""
    if machine is None:
        return None
    trainer = machine.flops(config.model.dtype)
    quantized = config.rollout.engine == "sglang" and config.rollout.sglang.quantization is not None
    return trainer, machine.matmul_flops.get("fp8", trainer) if quantized else trainer


@dataclass
class Predictor:
    """Predicts each step of a run after it, as long as that costs next to nothing; never ends the run.

    ranks: of the trainer. clock: seconds that never go back.
    """

    config: RunConfig
    machine: Machine
    ranks: int
    clock: Callable[[], float] = time.perf_counter
    _resolved: tuple[Plan, Assumptions] | None = None
    _spent: float = 0.0
    _run: float = 0.0  # seconds of the steps so far
    _watch: PredictionWatch = field(init=False)
    _effort: BestEffort = field(init=False)

    def __post_init__(self) -> None:
        self._watch = PredictionWatch(self.config.logging.machine or self.machine.name)
        self._effort = BestEffort("predicting a step's seconds (logging.machine)", Exception)

    def metrics(
        self, batch: RolloutBatch, metrics: Mapping[str, float], *, server_gpus: int, whole: bool
    ) -> dict[str, float]:
        """plan/...; {} where the step is left out: predictions have cost too much by now, or have failed.

        Args:
            metrics: of the step.
            server_gpus: that generate and do not train.
            whole: the step did all that a step does; else nothing is said of its seconds.
        """
        found: dict[str, float] = {}
        self._run += metrics.get("time/total", 0.0)

        def work() -> None:
            if self._resolved is None:  # once, some milliseconds
                plan = resolve_plan(self.config, self.ranks, self.machine.memory_gib, self.machine.device)
                self._resolved = plan, read_assumptions(self.config)
            started = self.clock()
            predicted = self._predict(*self._resolved, batch, metrics, server_gpus)
            self._spent += self.clock() - started
            found.update(plan_metrics(predicted, metrics))
            for line in self._watch.add(predicted, metrics) if whole else []:
                logger.warning("step %d: %s", batch.step, line)

        if self._spent <= _SHARE * self._run:
            self._effort(work)
        return found

    def _predict(
        self,
        plan: Plan,
        base: Assumptions,
        batch: RolloutBatch,
        metrics: Mapping[str, float],
        server_gpus: int,
    ) -> dict[str, float]:
        samples = list(batch.samples())
        base = replace(base, imbalance=metrics.get("rank_imbalance", base.imbalance))
        lengths = Assumptions.of_lengths(
            [len(sample.prompt_ids) for sample in samples],
            [len(sample.generation.response_ids) for sample in samples],
            base=base,
        )
        step = predict_step(plan, self.machine, lengths, server_gpus)
        return {phase.name: phase.seconds for phase in step.phases} | {STEP: step.seconds}
