"""What a run optimizes: its policy loss and advantages, built in or the user's, and means over whole responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_laser.algorithms import advantages as adv
from megatron_laser.algorithms.objectives import (
    POLICY_LOSSES,
    PolicyRows,
    RowLosses,
    needs_whole_responses,
)
from megatron_laser.algorithms.policy_loss import ImportanceLevel, log_importance
from megatron_laser.algorithms.reward_shaping import length_penalties, overlong_penalties
from megatron_laser.config.readouts import Readout, readout_setting, readouts
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.trainer.micro_batch import LabelledRows
from megatron_laser.trainer.step_metrics import score_key
from megatron_laser.trainer.user_objectives import checked_advantages, checked_policy_loss
from megatron_laser.user_functions import bind, load_function


class ResponseMeans:
    """Means over the sampled tokens of whole responses, whose rows may lie on several context-parallel ranks."""

    def __init__(self, lengths: Tensor, group: dist.ProcessGroup | None) -> None:
        """
        Args:
            lengths: [samples] sampled tokens, on the device.
            group: the context-parallel ranks; None for one.
        """
        self._lengths = lengths.double()
        self._group = group

    def of(self, sample: Tensor) -> Callable[[Tensor], Tensor]:
        """values [rows] -> the mean over the row's response [rows], without gradient; `sample` [rows] says which it is.

        All rows of these responses on this rank must be there. A collective over the group.
        """

        def average(values: Tensor) -> Tensor:
            # Sorted, so that every sum has a fixed order (index_add_ would not on a GPU).
            sums = torch.zeros_like(self._lengths).index_put_(
                (sample,), values.detach().double(), accumulate=True
            )
            if self._group is not None:
                dist.all_reduce(sums, group=self._group)
            return (sums / self._lengths.clamp(min=1.0))[sample].to(values.dtype)

        return average

    def log_importance(self, rows: LabelledRows, old: Tensor, level: ImportanceLevel) -> Tensor:
        """`policy_loss.log_importance` of policy rows, [policy rows]."""
        return log_importance(
            old,
            rows.rollout_logprobs,
            level=level,
            average=None if level == "token" else self.of(rows.policy_sample),
            lengths=self._lengths[rows.policy_sample],
        )


@dataclass(frozen=True)
class Shaping:
    """Terms for length in the reward that advantages are made of; both off: the reward itself."""

    overlong_buffer: int | None
    overlong_penalty: float
    length_penalty: float
    max_new_tokens: int

    def __call__(
        self,
        rewards: Tensor,
        labels: Tensor,
        lengths: Tensor,
        sampled: Tensor,
        truncated: Tensor,
        group_ids: Tensor,
    ) -> Tensor:
        """[samples]: of the rewards and labels, tokens and sampled tokens, which responses were cut off, and groups."""
        shaped = rewards
        if self.overlong_buffer is not None:
            shaped = shaped + overlong_penalties(
                lengths,
                max_new_tokens=self.max_new_tokens,
                buffer=self.overlong_buffer,
                penalty=self.overlong_penalty,
                truncated=truncated,
            )
        if self.length_penalty:
            shaped = shaped + length_penalties(sampled, labels, group_ids, weight=self.length_penalty)
        return shaped


class Objective:
    """Policy loss and advantages of one configuration.

    whole_responses: the loss needs all rows of a micro-batch at once. weighs_before_update: importance weights are of
    whole responses and can be known before the update.
    """

    def __init__(self, config: RunConfig) -> None:
        """Raises UserFunctionError for a function of the user's that cannot be loaded or called."""
        policy = config.policy
        self._policy = policy
        known = dict(clip_low=policy.clip_low, clip_high=policy.clip_high, dual_clip=policy.dual_clip)
        found = POLICY_LOSSES.get(policy.loss) or load_function("policy.loss", policy.loss)
        bound = bind("policy.loss", found, 1, known=known, options=policy.loss_options)
        self.policy_loss: Callable[[PolicyRows], RowLosses | Tensor] = (
            bound if policy.loss in POLICY_LOSSES else checked_policy_loss(policy.loss, bound)
        )
        corrects = policy.importance_cap is not None or policy.importance_mask is not None
        weighs_responses = corrects and policy.importance_level != "token"
        known_before = policy.old_logprobs == "recompute"
        self.weighs_before_update = weighs_responses and known_before
        self.whole_responses = needs_whole_responses(found) or (weighs_responses and not known_before)
        self._estimator: Callable[[adv.AdvantageBatch], Tensor] | None = None
        if policy.advantage not in adv.ESTIMATORS:
            self._estimator = bind(
                "policy.advantage",
                load_function("policy.advantage", policy.advantage),
                1,
                known={},
                options=policy.advantage_options,
            )
        self._readouts = readouts(config)
        self._settings = [
            readout_setting(config, index, "advantages") for index in range(len(self._readouts))
        ]
        self._effects = {
            spec.name: load_function(setting, spec.advantages)
            for setting, spec in zip(self._settings, self._readouts, strict=True)
            if ":" in spec.advantages
        }
        self._shaping = Shaping(
            policy.overlong_buffer,
            policy.overlong_penalty,
            policy.length_penalty,
            config.rollout.max_new_tokens,
        )

    def unusable(self, scores: Sequence[tuple[Tensor, Tensor]], step: int) -> tuple[str, ...]:
        """Which scores the step's advantages need and are not finite, by the names that bad steps have; () for none.

        Those that change advantages, and the response's score where a function of the user's is given it. No advantage
        can be made of the step then, and it is skipped. `scores`: as of `advantages`.
        """
        found = []
        for index, (spec, (values, scored)) in enumerate(zip(self._readouts, scores)):
            given = index == 0 and self._estimator is not None
            used = given or spec.changes_advantages(step)
            if used and not bool(values[scored].isfinite().all()):
                found.append(score_key(index, spec.name))
        return tuple(found)

    def advantages(
        self,
        *,
        rewards: Tensor,
        labels: Tensor | None = None,
        group_ids: Tensor,
        lengths: Tensor,
        sampled_lengths: Tensor,
        truncated: Tensor,
        scores: Sequence[tuple[Tensor, Tensor]],
        step: int,
    ) -> tuple[Tensor, float]:
        """Advantages [samples] float32, and the share of groups in which scores were mixed in.

        Args:
            rewards, labels, group_ids, lengths, sampled_lengths, truncated: [samples], of the whole rollout batch;
                labels None: the rewards; lengths are of whole responses, which `rollout.max_new_tokens` is about, and
                without what an environment wrote.
            scores: for each readout (scores [samples], scored [samples] bool); of prefixes nothing is scored. Where
                some are `unusable` nothing is done with any, and no function of the user's is called: the step is
                skipped, and its advantages are the built-in estimator's, or NaN.
            step: of the run, from 1.

        Raises:
            UserFunctionError: a function of the user's returned something else than finite advantages.
        """
        unusable = bool(self.unusable(scores, step))
        labels = rewards if labels is None else labels
        shaped = self._shaping(rewards, labels, lengths, sampled_lengths, truncated, group_ids)
        first = scores[0] if scores else (torch.full_like(rewards, torch.nan), torch.zeros_like(truncated))
        facts = dict(
            rewards=shaped.double(),
            labels=labels.double(),
            group_ids=group_ids,
            lengths=sampled_lengths.long(),
        )
        if self._estimator is None:
            result = adv.verifier_advantages(
                shaped,
                group_ids,
                estimator=self._policy.advantage,
                normalize_std=self._policy.normalize_std,
            )
        elif unusable:
            result = torch.full_like(rewards, torch.nan)
        else:
            batch = _batch(facts, first, torch.zeros_like(rewards))
            name = self._policy.advantage
            result = checked_advantages("policy.advantage", name, self._estimator(batch), rewards)
        if unusable:
            return result, 0.0
        mixed = 0.0
        for setting, spec, (values, scored) in zip(self._settings, self._readouts, scores):
            if not spec.changes_advantages(step):
                continue
            if spec.advantages == "mix":
                result, share = _mix(spec, values, scored, group_ids, result)
                mixed = max(mixed, share)
            elif spec.advantages == "discrepancy":
                result = adv.discrepancy_advantages(
                    result,
                    values,
                    scored,
                    labels,
                    group_ids,
                    kappa=spec.kappa,
                    bounds=spec.discrepancy_bounds,
                )
            else:
                batch = _batch(facts, (values, scored), result)
                found = self._effects[spec.name](batch)
                result = checked_advantages(setting, spec.advantages, found, rewards)
        return result, mixed


def _mix(
    spec: Readout, scores: Tensor, scored: Tensor, group_ids: Tensor, verifier: Tensor
) -> tuple[Tensor, float]:
    rule: dict[str, Any] = dict(std_threshold=spec.std_threshold, unscored=spec.unscored)
    own = adv.self_reward_advantages(scores, scored, group_ids, verifier, **rule)
    return (
        adv.mix_advantages(verifier, own, tau=spec.tau),
        adv.groups_mixed(scores, scored, group_ids, **rule),
    )


def _batch(facts: dict[str, Tensor], score: tuple[Tensor, Tensor], advantages: Tensor) -> adv.AdvantageBatch:
    values, scored = score
    return adv.AdvantageBatch(
        **facts, scores=values.double(), scored=scored.bool(), advantages=advantages.double()
    )
