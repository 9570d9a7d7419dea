"""How log pi(z_c) moves while a run trains: on the same held responses, every few steps (`laser.drift_every`).

c_ref is a constant that was measured on the initial model. Wrong responses are trained to stay at it and right ones to
rise by 1 / beta; where there is a reference model, its own log pi_ref(z_c) on today's responses shows whether the
constant still stands for it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.observability.timers import Timers
from megatron_laser.trainer.chunks import Chunks
from megatron_laser.trainer.forward_backward import run_forward
from megatron_laser.trainer.held_responses import HeldResponses, first_scored, only, write_held
from megatron_laser.trainer.run_readouts import RunReadouts
from megatron_laser.trainer.step_data import check_token_ids
from megatron_laser.trainer.trainer import StepResult, Trainer

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]


class ScoreDrift:
    """Holds responses and measures on them; every rank has one, and all call alike. Off: its calls do nothing."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        trainer: Trainer,
        timers: Timers,
        *,
        score_token_id: int | None,
        held: HeldResponses | None = None,
        first_step: int = 1,
    ) -> None:
        """
        Args:
            held: what the run's file has, the same on every rank.
            first_step: that is trained next. What is held of it or a later one was of an attempt that is not gone on
                with.
        """
        self._config = config
        self._runtime = runtime
        self._trainer = trainer
        self._timers = timers
        self._every = config.laser.drift_every if config.laser.enabled else 0
        self._held = held if held is not None and held.flat.step < first_step else None
        self._first_step = first_step
        self._reading = _reading(config)
        self._readouts = RunReadouts.of(self._reading, score_token_id if self._every else None)

    def hold(self, flat: FlatBatch, step: int) -> None:
        """Before the update of `step`: keep scored responses of its batch, unless some are held already.

        A batch without any is passed over. Rank 0 writes them into the output folder.
        """
        if not self._every or self._held is not None:
            return
        chosen = first_scored(flat, self._config.laser.drift_samples)
        if not len(chosen):
            return
        trainer = self._trainer
        check_token_ids(flat, trainer.policy.chunks.geometry.vocab)
        kept = only(flat, chosen, step=step)
        with self._timers("drift"):
            before = self._logprobs(kept, trainer.policy.chunks)
            c_ref = self._readouts.specs[0].ref_logprob
            if c_ref is None:  # laser.reference: model, on which such responses would have measured it
                assert trainer.reference is not None
                c_ref = float(self._logprobs(kept, trainer.reference).double().mean())
        self._held = HeldResponses(replace(kept, zc_logprobs=before.numpy()), c_ref)
        if self._runtime.is_main:
            self._keep(self._held)

    def measure(self, step: int, result: StepResult) -> dict[str, float]:
        """After the update of `step`: metrics, the same on every rank; {} where none are due."""
        every, held = self._every, self._held
        if not every or held is None or (step % every and step != self._config.run.steps):
            return {}
        with self._timers("drift"):
            now = self._logprobs(held.flat, self._trainer.policy.chunks)
        metrics = held_metrics(held, now.double().numpy())
        if self._trainer.reference is not None and result.reference_logprobs is not None:
            metrics |= reference_metrics(result.reference_logprobs.double().numpy(), held.c_ref)
        return metrics

    def _logprobs(self, flat: FlatBatch, chunks: Chunks) -> torch.Tensor:
        """[samples] float32: log pi(z_c) behind each response under the weights of `chunks`. A collective."""
        data = self._trainer.prepare(flat, self._reading, self._readouts)
        for minibatch in data.minibatches:
            for routing in minibatch.routings:
                routing.stage = "reference"  # counted and balanced for no update
        own = torch.zeros(int(data.points.slot_starts[-1]))
        batches = data.micro_batches
        outputs = run_forward(chunks, batches, lambda batch: batch.only_scores())
        if self._runtime.reports_rows:
            for batch, output in zip(batches, outputs):
                own[batch.score_slot.cpu()] = output[0].cpu()
        if self._runtime.world_size > 1:
            dist.all_reduce(own, group=self._runtime.cpu_group)
        return self._readouts.first_logprobs(data.points, own, flat.num_samples)

    def _keep(self, held: HeldResponses) -> None:
        flat, asked = held.flat, self._config.laser.drift_samples
        right, values = int((flat.rewards > 0.5).sum()), flat.zc_logprobs.astype(np.float64)
        of_step = f"of step {flat.step}, {right} right" + (
            f", all that it has (laser.drift_samples is {asked})" if flat.num_samples < asked else ""
        )
        logger.info(
            "drift of the score: %d responses are held %s; log pi(z_c) is %.3f +- %.3f nats, c_ref %.3f",
            *(flat.num_samples, of_step, values.mean(), _std(values), held.c_ref),
        )
        if flat.step > 1:
            logger.warning(
                "drift of the score: drift/shift counts from the weights before step %d, not from the initial ones: no "
                "responses were held before",
                flat.step,
            )
        try:
            write_held(self._config, held)
        except OSError as error:
            logger.error(
                "drift of the score: held responses cannot be written (%s); a resumed run takes others", error
            )


def held_metrics(held: HeldResponses, logprobs: Floats) -> dict[str, float]:
    """Of [samples] log pi(z_c) behind the held responses, nats."""
    right = held.flat.rewards > 0.5
    shift = logprobs - held.flat.zc_logprobs.astype(np.float64)
    return {
        "drift/held_step": float(held.flat.step),
        "drift/logprob_mean": _mean(logprobs),
        "drift/logprob_std": _std(logprobs),
        "drift/shift": _mean(shift),
        "drift/shift_std": _std(shift),
        "drift/right": _mean(logprobs[right]) - held.c_ref,
        "drift/wrong": _mean(logprobs[~right]) - held.c_ref,
    }


def reference_metrics(logprobs: Floats, c_ref: float) -> dict[str, float]:
    """Of log pi_ref(z_c) behind a step's own responses, NaN where one has none, nats."""
    scored = logprobs[~np.isnan(logprobs)]
    return {"drift/reference_mean": _mean(scored) - c_ref, "drift/reference_std": _std(scored)}


def _reading(config: RunConfig) -> RunConfig:
    """As `config` trains, but read in one piece, by today's routers, and for the response's score alone."""
    listed = config.laser.readouts
    return config.model_copy(
        update={
            "policy": config.policy.model_copy(update={"minibatches": 1}),
            "moe": config.moe.model_copy(update={"routing_replay": False}),
            "laser": config.laser.model_copy(update={"readouts": listed[:1] if listed else None}),
        }
    )


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _std(values: Floats) -> float:
    """Unbiased, as `calibrate` prints it."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan
