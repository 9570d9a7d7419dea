"""The training loss of one micro-batch, as sums over its labelled rows divided by global counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_laser.algorithms.kl import kl_penalty, mismatch
from megatron_laser.algorithms.policy_loss import (
    PolicyLoss,
    capped_importance,
    outside_bounds,
    weighted_policy_loss,
)
from megatron_laser.algorithms.readouts import readout_loss
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.ops import RowLoss
from megatron_laser.trainer.micro_batch import LabelledRows
from megatron_laser.trainer.objective import Objective, ResponseMeans
from megatron_laser.trainer.run_readouts import PointTensors, RunReadouts
from megatron_laser.trainer.step_data import MiniBatch
from megatron_laser.trainer.step_metrics import ROWS_KEY, readout_key


@dataclass(frozen=True)
class BatchTensors:
    """What the loss needs of the rollout batch, on the device.

    advantages: [samples] float32, as the policy loss uses them. means: over the responses' tokens. points: of the
    readouts. engine_zc_logprobs: [samples], what the rollout engine read at the end of each response, None where it
    does not.
    """

    advantages: torch.Tensor
    means: ResponseMeans
    points: PointTensors
    engine_zc_logprobs: torch.Tensor | None = None


class _Terms(NamedTuple):
    """The loss of some labelled rows and what it was made of; what the configuration does not ask for is None.

    total, kl: scalars with a gradient. outside [policy rows] bool: the importance mask. row_kl [policy rows].
    readouts: each readout's loss, a scalar, None where it is not trained yet.
    """

    total: torch.Tensor
    policy: PolicyLoss
    outside: torch.Tensor | None
    kl: torch.Tensor | None
    row_kl: torch.Tensor | None
    readouts: list[torch.Tensor | None]


class TrainLoss:
    """loss = policy + kl_coefficient * KL - entropy_coefficient * entropy + each readout's weight * its loss."""

    def __init__(
        self,
        config: RunConfig,
        minibatch: MiniBatch,
        batch: BatchTensors,
        objective: Objective,
        readouts: RunReadouts,
        *,
        step: int,
        compares_with_engine: bool,
        compares_scores: bool,
    ) -> None:
        """
        Args:
            step: of the run, from 1; readouts train from theirs on.
            compares_with_engine: the old log-probs are of the weights that generated, and compare to the engine's.
            compares_scores: so are the weights that are being trained, and their log-probs of the score token.
        """
        self._policy = config.policy
        self._minibatch = minibatch
        self._batch = batch
        self._objective = objective
        self._readouts = readouts
        self._trained = [spec.trains(step) for spec in readouts.specs]
        self._compares_with_engine = compares_with_engine
        self._compares_scores = compares_scores
        names = [spec.name for spec in readouts.specs]
        more = [readout_key(index, name, trained=True) for index, name in enumerate(names)][1:]
        self.terms = (
            *("policy_loss", "self_reward_loss", "self_reward_error"),
            *more,
            *("kl_loss", "entropy"),
        )

    def __call__(
        self, micro_batch: LabelledRows, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and detached sums (see `step_metrics`) from the head's output [1 or 2, rows]."""
        logprobs, entropies = output[0], output[1] if len(output) > 1 else None
        terms = self._terms(micro_batch, logprobs, entropies)
        with torch.no_grad():
            sums = self._sums(micro_batch, logprobs, entropies, terms)
        # Every output row stays in the graph, so that each parameter gets a gradient on every micro-batch.
        return terms.total + 0.0 * logprobs.sum(), {name: value.double() for name, value in sums.items()}

    def row_loss(self, micro_batch: LabelledRows) -> RowLoss | None:
        """The loss of a block of the micro-batch's labelled rows, for the log-prob op; None where it is none.

        Every term is a sum over rows divided by counts of the global batch: the losses of blocks add up to that of the
        micro-batch, and a row's gradient does not depend on the block that it is in. A policy loss of whole responses,
        and a readout of several tokens at once, need rows together that a block may part.
        """
        joined = any(
            spec.joins_tokens for spec, on in zip(self._readouts.specs, self._trained, strict=True) if on
        )
        if joined or self._objective.whole_responses:
            return None

        def loss(logprobs: torch.Tensor, entropies: torch.Tensor | None, rows: slice) -> torch.Tensor:
            return self._terms(micro_batch.block(rows), logprobs, entropies).total

        return loss

    def _terms(
        self, rows: LabelledRows, all_logprobs: torch.Tensor, all_entropies: torch.Tensor | None
    ) -> _Terms:
        """The loss of labelled rows, both kinds in order: log-probs and entropies are [rows]."""
        policy = self._policy
        logprobs = all_logprobs.index_select(0, rows.policy_rows)
        weights = self._minibatch.token_weights[rows.policy_sample]
        old = logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs
        importance, outside = self._importance(rows, old)
        clipped = weighted_policy_loss(
            self._objective.policy_loss,
            logprobs,
            old,
            self._batch.advantages[rows.policy_sample],
            weights,
            importance_weights=importance,
            average=self._batch.means.of(rows.policy_sample) if self._objective.whole_responses else None,
        )
        total = clipped.loss
        row_kl = kl = None
        if rows.reference_logprobs is not None and policy.kl_coefficient != 0.0:
            row_kl = kl_penalty(logprobs, rows.reference_logprobs, policy.kl_estimator)
            kl = (weights * row_kl).sum()
            total = total + policy.kl_coefficient * kl
        if all_entropies is not None and policy.entropy_coefficient != 0.0:
            entropies = all_entropies.index_select(0, rows.policy_rows)
            total = total - policy.entropy_coefficient * (weights * entropies).sum()
        losses: list[torch.Tensor | None] = []
        for index, trained in enumerate(self._trained):
            losses.append(self._readout(index, rows, all_logprobs) if trained else None)
            if (one := losses[-1]) is not None:
                total = total + self._readouts.specs[index].weight * one
        return _Terms(total, clipped, outside, kl, row_kl, losses)

    def _importance(
        self, rows: LabelledRows, old: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Importance weights [policy rows], and which rows the mask leaves out; None for what is off."""
        policy = self._policy
        if policy.importance_cap is None and policy.importance_mask is None:
            return None, None
        log_ratio = rows.log_importance
        if log_ratio is None:
            log_ratio = self._batch.means.log_importance(rows, old, policy.importance_level)
        weights = outside = None
        if policy.importance_cap is not None:
            weights = capped_importance(log_ratio, policy.importance_cap)
        if policy.importance_mask is not None:
            outside = outside_bounds(log_ratio, policy.importance_mask)
            weights = torch.ones_like(log_ratio) if weights is None else weights
            weights = torch.where(outside, 0.0, weights)
        return weights, outside

    def _sums(
        self,
        rows: LabelledRows,
        all_logprobs: torch.Tensor,
        all_entropies: torch.Tensor | None,
        terms: _Terms,
    ) -> dict[str, torch.Tensor]:
        """What is reported: the terms of the loss, and plain sums over rows, which the loss does not need."""
        logprobs = all_logprobs.index_select(0, rows.policy_rows)
        sums = {
            ROWS_KEY: logprobs.new_tensor(logprobs.numel(), dtype=torch.float64),
            "total_loss": terms.total,
            "policy_loss": terms.policy.loss,
            "clip_fraction": terms.policy.clipped,
            "approx_kl": terms.policy.approx_kl,
        }
        if terms.outside is not None:
            sums["importance_masked_fraction"] = terms.outside.sum()
        if self._compares_with_engine:
            recomputed = self._policy.old_logprobs != "rollout" and rows.old_logprobs is not None
            difference = mismatch(rows.old_logprobs if recomputed else logprobs, rows.rollout_logprobs)
            sums["mismatch_count"] = difference.count
            sums["mismatch_sum"] = difference.diff_sum
            sums["mismatch_k3"] = difference.k3_sum
            sums["max_mismatch"] = difference.diff_max
        engine_scores = self._batch.engine_zc_logprobs
        if self._compares_scores and engine_scores is not None:
            own = all_logprobs.index_select(0, rows.score_rows)
            difference = mismatch(own, engine_scores[rows.score_sample])
            sums["zc_mismatch_count"] = difference.count
            sums["zc_mismatch_sum"] = difference.diff_sum
            sums["max_zc_mismatch"] = difference.diff_max
        if terms.kl is not None and terms.row_kl is not None:
            sums["kl_loss"] = terms.kl
            sums["reference_kl"] = terms.row_kl.sum(dtype=torch.float64)
        if all_entropies is not None:
            sums["entropy"] = all_entropies.index_select(0, rows.policy_rows).sum(dtype=torch.float64)
        for index, loss in enumerate(terms.readouts):
            if loss is None and len(rows.score_rows):
                loss = self._readout(index, rows, all_logprobs)
            if loss is not None:
                sums[readout_key(index, self._readouts.specs[index].name, trained=self._trained[index])] = (
                    loss
                )
        return {name: value.detach() for name, value in sums.items()}

    def _readout(self, index: int, rows: LabelledRows, all_logprobs: torch.Tensor) -> torch.Tensor:
        """The loss of one readout's rows, without its weight."""
        spec, points = self._readouts.specs[index], self._batch.points
        tokens = len(self._readouts.token_ids[index])
        read, slots = rows.read_by(index)
        places = points.slot_points[slots[::tokens]]
        return readout_loss(
            all_logprobs.index_select(0, read).reshape(-1, tokens),
            points.labels[places],
            points.right[places],
            kind=spec.score,
            loss=spec.loss,
            class_weights=self._minibatch.class_weights[index],
            count=self._minibatch.point_counts[index],
            beta=spec.beta,
            ref_logprob=points.reference_logprobs[places],
            targets=spec.targets,
            margin=spec.margin,
        )
