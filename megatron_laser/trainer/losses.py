"""The training loss of one micro-batch, as sums over its labelled rows divided by global counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_laser.algorithms.kl import kl_penalty, mismatch
from megatron_laser.algorithms.policy_loss import importance_outside, importance_weights, policy_loss
from megatron_laser.algorithms.self_reward import self_reward_loss, self_reward_scores
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.trainer.step_data import MicroBatch, MiniBatch
from megatron_laser.trainer.step_metrics import ROWS_KEY


@dataclass(frozen=True)
class SampleTensors:
    """Per sample of the rollout batch, [samples] float32 on the device.

    advantages: the mixed advantages; rewards: the verifier's r_v; reference_zc_logprobs: c_ref of each sample.
    """

    advantages: torch.Tensor
    rewards: torch.Tensor
    reference_zc_logprobs: torch.Tensor


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
    ) -> None:
        """`compares_with_engine`: the old log-probs are of the weights that generated, and compare to the engine's."""
        self._policy = config.policy
        self._laser = config.laser
        self._minibatch = minibatch
        self._samples = samples
        self._with_self_reward = with_self_reward
        self._compares_with_engine = compares_with_engine

    def __call__(
        self, micro_batch: MicroBatch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and detached sums (see `step_metrics`) from the head's output [1 or 2, rows]."""
        logprobs = output[0].index_select(0, micro_batch.policy_rows)
        weights = self._minibatch.token_weights[micro_batch.policy_sample]
        total, sums = self._policy_terms(micro_batch, logprobs, weights)
        if output.shape[0] > 1:
            entropies = output[1].index_select(0, micro_batch.policy_rows)
            sums["entropy"] = entropies.sum(dtype=torch.float64)
            if self._policy.entropy_coefficient != 0.0:
                total = total - self._policy.entropy_coefficient * (weights * entropies).sum()
        if len(micro_batch.score_rows) or self._with_self_reward:
            zc_logprobs = output[0].index_select(0, micro_batch.score_rows)
            self_reward = self._self_reward(micro_batch, zc_logprobs)
            if self._with_self_reward:
                sums["self_reward_loss"] = self_reward
                total = total + self._laser.alpha * self_reward
            else:
                sums["self_reward_error"] = self_reward
        sums["total_loss"] = total
        # Every output row stays in the graph, so that each parameter gets a gradient on every micro-batch.
        total = total + 0.0 * output[0].sum()
        return total, {name: value.detach().double() for name, value in sums.items()}

    def _policy_terms(
        self, micro_batch: MicroBatch, logprobs: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy = self._policy
        old = logprobs.detach() if micro_batch.old_logprobs is None else micro_batch.old_logprobs
        sums = {ROWS_KEY: weights.new_tensor(weights.numel(), dtype=torch.float64)}
        importance = None
        if policy.importance_cap is not None:
            importance = importance_weights(old, micro_batch.rollout_logprobs, policy.importance_cap)
        if policy.importance_mask is not None:
            outside = importance_outside(old, micro_batch.rollout_logprobs, policy.importance_mask)
            importance = torch.ones_like(weights) if importance is None else importance
            importance = torch.where(outside, 0.0, importance)
            sums["importance_masked_fraction"] = outside.sum()
        terms = policy_loss(
            logprobs,
            old,
            self._samples.advantages[micro_batch.policy_sample],
            weights,
            clip_low=policy.clip_low,
            clip_high=policy.clip_high,
            dual_clip=policy.dual_clip,
            importance_weights=importance,
        )
        sums |= {
            "policy_loss": terms.loss,
            "clip_fraction": terms.clipped,
            "approx_kl": terms.approx_kl,
        }
        if self._compares_with_engine:
            trainer_logprobs = logprobs if policy.old_logprobs == "rollout" else old
            difference = mismatch(trainer_logprobs, micro_batch.rollout_logprobs)
            sums["mismatch_count"] = difference.count
            sums["mismatch_sum"] = difference.diff_sum
            sums["mismatch_k3"] = difference.k3_sum
            sums["max_mismatch"] = difference.diff_max
        total = terms.loss
        if micro_batch.reference_logprobs is not None and policy.kl_coefficient != 0.0:
            row_kl = kl_penalty(logprobs, micro_batch.reference_logprobs, policy.kl_estimator)
            kl = (weights * row_kl).sum()
            sums["kl_loss"] = kl
            sums["reference_kl"] = row_kl.sum(dtype=torch.float64)
            total = total + policy.kl_coefficient * kl
        return total, sums

    def _self_reward(self, micro_batch: MicroBatch, zc_logprobs: torch.Tensor) -> torch.Tensor:
        laser = self._laser
        reference = self._samples.reference_zc_logprobs[micro_batch.score_sample]
        return self_reward_loss(
            self_reward_scores(zc_logprobs, ref_logprob=reference, beta=laser.beta),
            self._samples.rewards[micro_batch.score_sample],
            class_weights=self._minibatch.class_weights,
            num_scored=self._minibatch.num_scored,
            targets=laser.targets,
            kind=laser.loss,
            ref_logprob=reference,
            beta=laser.beta,
        )
