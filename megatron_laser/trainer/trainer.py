"""The trainer: one call per rollout batch, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.config.derived import (
    needs_reference_model,
    old_policy_pass_kind,
    pipeline_bubble,
    shared_prompt_problems,
)
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.errors import UserError
from megatron_laser.model import platform
from megatron_laser.model.experts import Pass
from megatron_laser.model.hf_config import architecture_of
from megatron_laser.model.machine import knows_shared_prompts
from megatron_laser.observability.timers import Timers
from megatron_laser.trainer.bad_steps import BadSteps
from megatron_laser.trainer.expert_routing import Counts, Experts, expert_metrics
from megatron_laser.trainer.forward_backward import OptimizerStep, optimizer_step, run_forward
from megatron_laser.trainer.losses import BatchTensors, TrainLoss
from megatron_laser.trainer.objective import Objective, ResponseMeans
from megatron_laser.trainer.policy import Policy, build_policy, build_reference
from megatron_laser.trainer.run_readouts import ReadoutScores, RunReadouts
from megatron_laser.trainer.step_data import StepData, check_token_ids, prepare_step
from megatron_laser.trainer.step_metrics import means, ratio, readout_key, reduce_sums
from megatron_laser.trainer.token_values import OwnTokens, TokenValues


class MismatchError(UserError, RuntimeError):
    """Trainer and rollout engine disagree by more than `policy.mismatch_abort`."""


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    metrics: flat names, the same on every rank. zc_logprobs, scores: [samples] log pi(z_c | x, y, EOS) and
    r_s of the policy that generated the batch, NaN where a response has none (or LaSeR is off). advantages:
    [samples], as used by the policy loss. All on the CPU. updates: the optimizer steps, skipped ones too. readouts:
    what each readout read of the batch; `scores` are the first one's. reference_logprobs: as zc_logprobs, of the
    reference model. tokens: of the old policy, where a dump wants them (`token_values`); on rank 0.
    """

    metrics: dict[str, float]
    zc_logprobs: torch.Tensor
    scores: torch.Tensor
    advantages: torch.Tensor
    updates: tuple[OptimizerStep, ...]
    readouts: tuple[ReadoutScores, ...] = ()
    reference_logprobs: torch.Tensor | None = None
    tokens: TokenValues | None = None


class Trainer:
    """Policy, optimizer and everything that turns a rollout batch into an update."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        *,
        score_token_id: int | None,
        timers: Timers | None = None,
        policy: Policy | None = None,
    ) -> None:
        """Build the model from `model.path`; a reference model only when a setting needs one.

        Args:
            score_token_id: z_c; required when `laser.enabled`.
            policy: what to train instead of a model of its own: another trainer's, which takes turns with this one.
        """
        if config.laser.enabled and score_token_id is None:
            raise ValueError("laser.enabled needs the id of laser.score_token")
        self._config = config
        self._runtime = runtime
        self._timers = timers or Timers()
        self._score_token_id = score_token_id if config.laser.enabled else None
        self._readouts = RunReadouts.of(config, self._score_token_id)
        self._objective = Objective(config)
        self.policy = build_policy(config) if policy is None else policy
        self.reference = build_reference(config) if needs_reference_model(config) else None
        self.policy.memory.reference = self.reference
        self._architecture = architecture_of(self.policy.chunks.hf)
        self._experts = self._model_experts()
        self._share_prompts = self._prompts_are_shared()
        self._bad_steps = BadSteps(config, runtime, score_token_id=self._score_token_id)

    def _prompts_are_shared(self) -> bool:
        batching, layers = self._config.batching, self._config.model.layers
        able = batching.share_prompts is not False and knows_shared_prompts(layers)
        return able and not shared_prompt_problems(self._config, experts=self._experts is not None)

    def train_step(self, flat: FlatBatch, step: int) -> StepResult:
        """One rollout batch of a run: `run_batch`, and what a run must not go on with.

        Args:
            flat: the whole batch, the same on every rank.
            step: counted from 1; the warm-ups count it.

        Raises:
            BadStepsError: `run.max_bad_steps` steps in a row had an update skipped.
            MismatchError: trainer and engine differ by more than `policy.mismatch_abort`.
            ValueError: a token id is not in the vocabulary, or a sample is not graded.
        """
        result = self.run_batch(flat, step)
        self._bad_steps.note(flat, step, result.updates)
        self._check_mismatch(flat, step, result.metrics)
        return result

    def run_batch(self, flat: FlatBatch, step: int) -> StepResult:
        """Old-policy pass, advantages, and the optimizer steps of `policy`.

        An optimizer step whose loss or gradient norm is not finite is skipped on all ranks; `bad_steps` counts
        them and the other metrics leave them out.
        """
        check_token_ids(flat, self.policy.chunks.geometry.vocab)
        if self._experts is not None:
            self._experts.check(flat)
        config = self._config
        data = self.prepare(flat)
        with self._timers("logprob"):
            self._set_pass(data, "old_policy")
            read = self._old_policy_pass(data, flat, tokens := OwnTokens(config, flat, step))
            self._balance_experts(data)
            self._set_pass(data, "reference")
            frozen = self._reference_pass(data)
        references = self._readouts.references(data.points, frozen)
        found = self._readouts.scores(data.points, read, references)
        scores = [item.of_samples(flat.num_samples) for item in found]
        zc_logprobs = self._readouts.first_logprobs(data.points, read, flat.num_samples)
        advantages, mixed = self._objective.advantages(
            rewards=data.policy_rewards,
            labels=data.rewards,
            group_ids=data.group_ids,
            lengths=torch.from_numpy(flat.response_lengths.astype(np.int64)),
            sampled_lengths=torch.from_numpy(flat.sampled_lengths.astype(np.int64)),
            truncated=torch.from_numpy(flat.cut_off(config.rollout.max_new_tokens)),
            scores=scores,
            step=step,
        )
        device = platform.device()
        batch = BatchTensors(
            advantages=advantages.to(device),
            means=ResponseMeans(torch.from_numpy(flat.sampled_lengths).to(device), self._context_ranks),
            points=self._readouts.tensors(flat, data.points, references, device),
            engine_zc_logprobs=zc_logprobs.to(device) if self._engine_scores else None,
        )
        self._weigh_responses(data, batch.means)
        self._set_pass(data, "train")
        with self._timers("train"):
            # A score that is missing or not finite is as bad as a loss: no advantage can be made of it.
            updates: tuple[OptimizerStep, ...]
            if unusable := self._objective.unusable(scores, step):
                updates = (OptimizerStep(0, 0, math.nan, unusable, []),)
            else:
                updates = self._optimize(data, batch, step)
        metrics = self._metrics(updates, data, step) | self._expert_metrics(data)
        metrics |= {"advantage_mixed_fraction": mixed, "micro_batches": float(len(data.micro_batches))}
        if data.rank_imbalance is not None:
            metrics["rank_imbalance"] = data.rank_imbalance
        if self._config.parallel.pipeline > 1:
            counts = [len(minibatch.micro_batches) for minibatch in data.minibatches]
            metrics["pipeline_bubble"] = pipeline_bubble(self._config.parallel, counts)
        first = scores[0][0] if scores else torch.full_like(data.rewards, math.nan)
        reference = self._readouts.first_logprobs(data.points, frozen, flat.num_samples)
        values = tokens.on_rank_zero(self._runtime)
        return StepResult(metrics, zc_logprobs, first, advantages, updates, tuple(found), reference, values)

    def _model_experts(self) -> Experts | None:
        """What the routers' share of a step is made with; None for a dense model."""
        chunks = self.policy.chunks
        moe = self._architecture.moe
        if moe is None:
            return None
        parallel, runtime = self._config.parallel, self._runtime
        return Experts(
            moe,
            chunks.geometry.num_layers,
            tuple(layer.layer_number - 1 for model in chunks.models for layer in model.decoder.layers),
            context=(parallel.context, runtime.context_rank),
            sequence=(parallel.tensor, runtime.tensor_rank) if parallel.sequence else (1, 0),
        )

    def _set_pass(self, data: StepData, stage: Pass) -> None:
        """Tell the routers what comes, and count each optimizer step's tokens anew."""
        if self._experts is None:
            return
        for minibatch in data.minibatches:
            minibatch.tally = self._experts.tally()
            for routing in minibatch.routings:
                routing.stage, routing.tally = stage, minibatch.tally

    def _balance_experts(self, data: StepData) -> None:
        """Each expert's share of an optimizer step's tokens, as the old policy sent them, for the auxiliary loss."""
        if self._config.moe.aux_loss_coefficient == 0.0:
            return
        for minibatch in data.minibatches:
            if minibatch.balance is not None and minibatch.tally is not None:
                load = Counts.of([minibatch.tally], self._all_ranks).load()
                minibatch.balance.load = load.to(platform.device())

    def _expert_metrics(self, data: StepData) -> dict[str, float]:
        """Of the tokens of all updates."""
        if self._experts is None:
            return {}
        tallies = [minibatch.tally for minibatch in data.minibatches if minibatch.tally is not None]
        return expert_metrics(Counts.of(tallies, self._all_ranks), self._experts.moe.experts_per_token)

    def prepare(
        self, flat: FlatBatch, config: RunConfig | None = None, readouts: RunReadouts | None = None
    ) -> StepData:
        """This rank's share of a rollout batch, cut and packed as it is trained on, or as `config` and `readouts` of it
        have it."""
        return prepare_step(
            flat,
            config or self._config,
            score_token_id=self._score_token_id,
            readouts=self._readouts if readouts is None else readouts,
            data_rank=self._runtime.data_rank,
            data_size=self._runtime.data_size,
            context_rank=self._runtime.context_rank,
            experts=self._experts,
            architecture=self._architecture,
            share_prompts=self._share_prompts,
        )

    def weight_stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face (name, full tensor) pairs on global rank 0; all ranks must exhaust it together."""
        self.policy.complete_weights()
        return self.policy.exporter.stream()

    def _old_policy_pass(self, data: StepData, flat: FlatBatch, tokens: OwnTokens) -> torch.Tensor:
        """Fill `old_logprobs` and `tokens`; return what readouts read, [slots] float32."""
        kind = old_policy_pass_kind(self._config)
        batches = data.micro_batches
        if self._config.policy.old_logprobs == "rollout":
            for batch in batches:
                batch.old_logprobs = batch.rollout_logprobs
        own = torch.zeros(int(data.points.slot_starts[-1]))
        if kind == "full":
            outputs = run_forward(self.policy.chunks, batches, tokens.head)
            for batch, output in zip(batches, outputs):
                batch.old_logprobs = output[0].index_select(0, batch.policy_rows)
                tokens.add(batch, output)
                own[batch.score_slot.cpu()] = output[0].index_select(0, batch.score_rows).cpu()
        elif kind == "score_rows":
            outputs = run_forward(self.policy.chunks, batches, lambda batch: batch.only_scores())
            for batch, output in zip(batches, outputs):
                own[batch.score_slot.cpu()] = output[0].cpu()
        if self._engine_scores:  # one token behind each response
            return torch.from_numpy(flat.zc_logprobs[data.points.sample].copy()).float()
        return self._sum_over_ranks(own)

    def _weigh_responses(self, data: StepData, means: ResponseMeans) -> None:
        """Fill `log_importance`, where it is of whole responses and old log-probs are known before the update."""
        if not self._objective.weighs_before_update:
            return
        level = self._config.policy.importance_level
        for batch in data.micro_batches:
            if batch.old_logprobs is not None:  # on the last pipeline stage
                batch.log_importance = means.log_importance(batch, batch.old_logprobs, level)

    @property
    def _context_ranks(self) -> dist.ProcessGroup | None:
        if self._config.parallel.context == 1:
            return None
        group: dist.ProcessGroup = parallel_state.get_context_parallel_group()
        return group

    @property
    def _engine_scores(self) -> bool:
        """Whether the rollout engine read the scores."""
        return self._score_token_id is not None and self._config.laser.score_source == "server"

    def _reference_pass(self, data: StepData) -> torch.Tensor | None:
        """Fill `reference_logprobs` if there is a reference model; return what readouts read of it, [slots]."""
        if self.reference is None:
            return None
        own = torch.zeros(int(data.points.slot_starts[-1]))
        batches = data.micro_batches
        outputs = run_forward(self.reference, batches, lambda batch: batch.without_entropy())
        for batch, output in zip(batches, outputs):
            batch.reference_logprobs = output[0].index_select(0, batch.policy_rows)
            own[batch.score_slot.cpu()] = output[0].index_select(0, batch.score_rows).cpu()
        return self._sum_over_ranks(own)

    def _sum_over_ranks(self, own: torch.Tensor) -> torch.Tensor:
        """Each sample's value from the one rank that has it."""
        if self._runtime.world_size > 1:
            if not self._runtime.reports_rows:
                own.zero_()
            dist.all_reduce(own, group=self._runtime.cpu_group)
        return own

    def _optimize(self, data: StepData, batch: BatchTensors, step: int) -> tuple[OptimizerStep, ...]:
        updates = []
        for epoch in range(self._config.policy.epochs):
            for index, minibatch in enumerate(data.minibatches):
                loss = TrainLoss(
                    self._config,
                    minibatch,
                    batch,
                    self._objective,
                    self._readouts,
                    step=step,
                    compares_with_engine=self._config.policy.old_logprobs == "recompute"
                    or (epoch, index) == (0, 0),
                    compares_scores=(epoch, index) == (0, 0),
                )
                updates.append(
                    optimizer_step(
                        self.policy,
                        minibatch.micro_batches,
                        loss,
                        epoch=epoch,
                        minibatch=index,
                        group=self._all_ranks,
                    )
                )
        return tuple(updates)

    @property
    def _all_ranks(self) -> dist.ProcessGroup | None:
        return self._runtime.cpu_group if self._runtime.world_size > 1 else None

    def _check_mismatch(self, flat: FlatBatch, step: int, metrics: dict[str, float]) -> None:
        limit = self._config.policy.mismatch_abort
        if limit is None:
            return
        mean = metrics["logprob_diff_mean"]
        if mean > limit or bool(np.isnan(flat.rollout_logprobs).any()):
            raise MismatchError(
                f"step {step}: logprob_diff_mean is {mean:g} nats (largest {metrics['logprob_diff_max']:g}, k3 KL "
                f"{metrics['rollout_k3_kl']:g}), more than policy.mismatch_abort {limit:g}: the engine does not "
                "sample from the policy that is trained. Check that it holds the weights of the last sync "
                "and uses rollout.temperature and the same precision; or raise the limit, or null"
            )

    def _metrics(self, updates: tuple[OptimizerStep, ...], data: StepData, step: int) -> dict[str, float]:
        """Means over the optimizer steps that were taken, or over their tokens (see `step_metrics`); NaN without any.

        `self_reward_loss` is there where it is part of the loss; before, the same number is `self_reward_error`. Those
        of further readouts are means over the steps in which something was read, and left out where nothing was.
        """
        taken = [update for update in updates if not update.bad]
        totals = reduce_sums(
            [entry for update in taken for entry in update.entries],
            contributes=self._runtime.reports_rows,
            group=self._all_ranks,
            more=self._more_losses,
        )
        unused = self._unused_names(step)
        reported = means(totals, updates=len(taken))
        for index, name in enumerate(self._more_losses, start=1):
            read = sum(data.minibatches[update.minibatch].point_counts[index] > 0 for update in taken)
            if read or not taken:
                reported[name] = ratio(totals[name], read)
        metrics = {k: v for k, v in reported.items() if k not in unused}
        metrics["grad_norm"] = ratio(sum(update.grad_norm for update in taken), len(taken))
        metrics["lr"] = self.policy.learning_rate()
        metrics["bad_steps"] = float(len(updates) - len(taken))
        metrics["logprob_diff_mean"] = ratio(totals["mismatch_sum"], totals["mismatch_count"])
        metrics["logprob_diff_max"] = totals["max_mismatch"] if totals["mismatch_count"] else math.nan
        metrics["rollout_k3_kl"] = ratio(totals["mismatch_k3"], totals["mismatch_count"])
        if self._engine_scores:
            metrics["zc_logprob_diff_mean"] = ratio(totals["zc_mismatch_sum"], totals["zc_mismatch_count"])
            compared = totals["zc_mismatch_count"] > 0
            metrics["zc_logprob_diff_max"] = totals["max_zc_mismatch"] if compared else math.nan
        return metrics

    @property
    def _more_losses(self) -> list[str]:
        """Metrics of the losses of all readouts but the first."""
        names = [spec.name for spec in self._readouts.specs]
        return [readout_key(index, name, trained=True) for index, name in enumerate(names)][1:]

    def _unused_names(self, step: int) -> set[str]:
        """Metrics of what this step does not compute, or does not have in its loss."""
        policy, specs = self._config.policy, self._readouts.specs
        unused = {"self_reward_error" if specs and specs[0].trains(step) else "self_reward_loss"}
        if not self._config.laser.enabled:
            unused.add("self_reward_error")
        if policy.kl_coefficient == 0.0:
            unused |= {"kl_loss", "reference_kl"}
        if policy.importance_mask is None:
            unused.add("importance_masked_fraction")
        return unused
