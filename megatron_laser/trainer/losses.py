"""The training loss of one micro-batch, as sums over its labelled rows divided by global counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_laser.algorithms.kl import kl_penalty, mismatch
from megatron_laser.algorithms.policy_loss import (
    PolicyLoss,
    importance_outside,
    importance_weights,
    policy_loss,
)
from megatron_laser.algorithms.self_reward import self_reward_loss, self_reward_scores
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.ops import RowLoss
from megatron_laser.trainer.step_data import LabelledRows, MiniBatch
from megatron_laser.trainer.step_metrics import ROWS_KEY


@dataclass(frozen=True)
class SampleTensors:
    """Per sample of the rollout batch, [samples] float32 on the device.

    advantages: the mixed advantages; rewards: the verifier's r_v; reference_zc_logprobs: c_ref of each sample;
    engine_zc_logprobs: what the rollout engine read at the end of each response, None where it does not.
    """

    advantages: torch.Tensor
    rewards: torch.Tensor
    reference_zc_logprobs: torch.Tensor
    engine_zc_logprobs: torch.Tensor | None = None


class _Terms(NamedTuple):
    """The loss of some labelled rows and what it was made of; what the configuration does not ask for is None.

    total, kl, self_reward: scalars with a gradient. outside [policy rows] bool: the importance mask. row_kl
    [policy rows].
    """

    total: torch.Tensor
    policy: PolicyLoss
    outside: torch.Tensor | None
    kl: torch.Tensor | None
    row_kl: torch.Tensor | None
    self_reward: torch.Tensor | None


class TrainLoss:
    """loss = policy + kl_coefficient * KL - entropy_coefficient * entropy + alpha * self-reward loss."""

    def __init__(
        self,
        config: RunConfig,
        minibatch: MiniBatch,
        samples: SampleTensors,
        *,
        with_self_reward: bool,
        compares_with_engine: bool,
        compares_scores: bool,
    ) -> None:
        """
        Args:
            compares_with_engine: the old log-probs are of the weights that generated, and compare to the engine's.
            compares_scores: so are the weights that are being trained, and their log-probs of the score token.
        """
        self._policy = config.policy
        self._laser = config.laser
        self._minibatch = minibatch
        self._samples = samples
        self._with_self_reward = with_self_reward
        self._compares_with_engine = compares_with_engine
        self._compares_scores = compares_scores

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

    def row_loss(self, micro_batch: LabelledRows) -> RowLoss:
        """The loss of a block of the micro-batch's labelled rows, for the log-prob op.

        Every term is a sum over rows divided by counts of the global batch: the losses of blocks add up to that of the
        micro-batch, and a row's gradient does not depend on the block that it is in.
        """

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
        importance = outside = None
        if policy.importance_cap is not None:
            importance = importance_weights(old, rows.rollout_logprobs, policy.importance_cap)
        if policy.importance_mask is not None:
            outside = importance_outside(old, rows.rollout_logprobs, policy.importance_mask)
            importance = torch.ones_like(weights) if importance is None else importance
            importance = torch.where(outside, 0.0, importance)
        clipped = policy_loss(
            logprobs,
            old,
            self._samples.advantages[rows.policy_sample],
            weights,
            clip_low=policy.clip_low,
            clip_high=policy.clip_high,
            dual_clip=policy.dual_clip,
            importance_weights=importance,
        )
        total = clipped.loss
        row_kl = kl = self_reward = None
        if rows.reference_logprobs is not None and policy.kl_coefficient != 0.0:
            row_kl = kl_penalty(logprobs, rows.reference_logprobs, policy.kl_estimator)
            kl = (weights * row_kl).sum()
            total = total + policy.kl_coefficient * kl
        if all_entropies is not None and policy.entropy_coefficient != 0.0:
            entropies = all_entropies.index_select(0, rows.policy_rows)
            total = total - policy.entropy_coefficient * (weights * entropies).sum()
        if self._with_self_reward:
            self_reward = self._self_reward(rows, all_logprobs)
            total = total + self._laser.alpha * self_reward
        return _Terms(total, clipped, outside, kl, row_kl, self_reward)

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
        engine_scores = self._samples.engine_zc_logprobs
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
        if terms.self_reward is not None:
            sums["self_reward_loss"] = terms.self_reward
        elif len(rows.score_rows):
            sums["self_reward_error"] = self._self_reward(rows, all_logprobs)
        return {name: value.detach() for name, value in sums.items()}

    def _self_reward(self, rows: LabelledRows, all_logprobs: torch.Tensor) -> torch.Tensor:
        laser = self._laser
        zc_logprobs = all_logprobs.index_select(0, rows.score_rows)
        reference = self._samples.reference_zc_logprobs[rows.score_sample]
        return self_reward_loss(
            self_reward_scores(zc_logprobs, ref_logprob=reference, beta=laser.beta),
            self._samples.rewards[rows.score_sample],
            class_weights=self._minibatch.class_weights,
            num_scored=self._minibatch.num_scored,
            targets=laser.targets,
            kind=laser.loss,
            ref_logprob=reference,
            beta=laser.beta,
        )
