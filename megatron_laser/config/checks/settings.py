"""Cross-field checks of the settings alone: combinations that cannot run or would not mean what they say."""

from __future__ import annotations

from megatron_laser.config.checks.keeping import keeping_problems
from megatron_laser.config.checks.layout import divisible
from megatron_laser.config.checks.memory import memory_problems
from megatron_laser.config.checks.rollout import rollout_problems
from megatron_laser.config.derived import (
    longest_sequence,
    micro_batch_tokens,
    needed_pad_multiple,
    optimizer_steps,
)
from megatron_laser.config.modes import mode_problems
from megatron_laser.config.readouts import readout_problems, readouts
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.schema.system import ParallelConfig
from megatron_laser.config.schema.training import PolicyConfig
from megatron_laser.errors import ConfigError


def check_settings(config: RunConfig) -> None:
    """Raises ConfigError with everything that `settings_problems` finds."""
    if problems := settings_problems(config):
        raise ConfigError(problems)


def settings_problems(config: RunConfig) -> list[str]:
    """Problems that show without the model and the world size; one line each, with the arithmetic."""
    return [
        *_model_problems(config),
        *readout_problems(config),
        *_drift_problems(config),
        *_policy_problems(config),
        *_optimizer_problems(config),
        *_parallel_problems(config),
        *_batch_problems(config),
        *rollout_problems(config),
        *mode_problems(config),
        *keeping_problems(config),
    ]


def _model_problems(config: RunConfig) -> list[str]:
    return [*_attention_problems(config), *memory_problems(config)]


def _attention_problems(config: RunConfig) -> list[str]:
    model = config.model
    if model.attention == "auto":
        return []
    where = ""
    if model.layers == "torch":
        where = "model.layers torch, which has torch's attention"
    elif model.dtype == "float32":
        where = "model.dtype float32, which no kernel of Transformer Engine takes"
    if not where:
        return []
    return [f"model.attention: {model.attention} with {where}; set model.attention to auto"]


def _drift_problems(config: RunConfig) -> list[str]:
    laser, rollout, found = config.laser, config.rollout, readouts(config)
    if not (laser.drift_every and found):
        return []
    problems = []
    if found[0].score != "scaled_logratio":
        problems.append(
            f"laser.drift_every: {laser.drift_every} with laser.readouts[0].score {found[0].score}, which has no c_ref "
            "to drift from; use 0"
        )
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    if laser.drift_samples > batch:
        problems.append(
            f"laser.drift_samples: {laser.drift_samples} of one step's responses, which are rollout.prompts_per_step "
            f"{rollout.prompts_per_step} x rollout.samples_per_prompt {rollout.samples_per_prompt} = {batch}; use as "
            "many or fewer"
        )
    return problems


def _policy_problems(config: RunConfig) -> list[str]:
    policy, rollout = config.policy, config.rollout
    problems = []
    own_estimator = ":" in policy.advantage  # a function of the user's, which may need no groups
    if rollout.samples_per_prompt < 2 and policy.advantage != "reinforce_pp" and not own_estimator:
        problems.append(
            f"rollout.samples_per_prompt: {rollout.samples_per_prompt} with policy.advantage {policy.advantage}; "
            "a group of one has no spread and no advantage: use 2 or more, or policy.advantage reinforce_pp"
        )
    if rollout.samples_per_prompt < 2 and rollout.drop_uniform_groups:
        problems.append(
            f"rollout.drop_uniform_groups: true with rollout.samples_per_prompt {rollout.samples_per_prompt}; "
            "every group of one is uniform and would be dropped: use 2 or more, or false"
        )
    if not policy.normalize_std and policy.advantage == "reinforce_pp":
        problems.append(
            "policy.normalize_std: false with policy.advantage reinforce_pp, which normalises over the batch; "
            "remove it, or use grpo, dr_grpo or rloo"
        )
    if not policy.normalize_std and own_estimator:
        problems.append(
            f"policy.normalize_std: false with policy.advantage {policy.advantage}, a function that normalises or not "
            "by itself; remove it, and give what the function takes as policy.advantage_options"
        )
    updates = policy.minibatches * policy.epochs
    if policy.old_logprobs == "on_policy" and updates != 1:
        problems.append(
            f"policy.old_logprobs: on_policy needs one optimizer step per rollout batch, but "
            f"policy.minibatches {policy.minibatches} x policy.epochs {policy.epochs} = {updates}; use "
            "recompute, or set both to 1"
        )
    if policy.importance_cap is not None and policy.old_logprobs == "rollout":
        problems.append(
            f"policy.importance_cap: {policy.importance_cap:g} with policy.old_logprobs rollout; the ratio "
            "is pi / pi_rollout already and would be corrected twice. Use recompute or on_policy, or null"
        )
    problems += _mask_problems(policy)
    problems += _objective_problems(config)
    problems += divisible(
        "rollout.prompts_per_step", rollout.prompts_per_step, "policy.minibatches", policy.minibatches
    )
    if not config.data.apply_chat_template:
        problems += [
            f"data.{name}: needs data.apply_chat_template: true; without a chat template leave it out"
            for name in ("chat_template_arguments", "system_prompt")
            if getattr(config.data, name)
        ]
    if config.evaluation.every and config.data.validation is None:
        problems.append(
            f"evaluation.every: {config.evaluation.every} needs data.validation, which is null; give a file "
            "or set evaluation.every to 0"
        )
    return problems


def _objective_problems(config: RunConfig) -> list[str]:
    policy, problems = config.policy, []
    if ":" not in policy.advantage and policy.advantage_options:
        problems.append(
            f"policy.advantage_options: {policy.advantage_options} with policy.advantage {policy.advantage}, which has "
            "none; they are for a function of yours"
        )
    known = _LOSS_OPTIONS.get(policy.loss, ())
    unknown = [name for name in policy.loss_options if ":" not in policy.loss and name not in known]
    if unknown:
        problems.append(
            f"policy.loss_options: {unknown[0]} with policy.loss {policy.loss}, whose options are "
            f"{', '.join(known) or 'none (it has clip_low and clip_high)'}"
        )
    if policy.dual_clip is not None and policy.loss != "ppo" and ":" not in policy.loss:
        problems.append(
            f"policy.dual_clip: {policy.dual_clip:g} with policy.loss {policy.loss}, which has no such bound; use ppo, "
            "or null"
        )
    if (
        policy.importance_level != "token"
        and policy.importance_cap is None
        and policy.importance_mask is None
    ):
        problems.append(
            f"policy.importance_level: {policy.importance_level} without policy.importance_cap or "
            "policy.importance_mask, which it is a setting of; give one of them, or token"
        )
    longest = config.rollout.max_new_tokens
    if policy.overlong_buffer is not None and policy.overlong_buffer > longest:
        problems.append(
            f"policy.overlong_buffer: {policy.overlong_buffer} is more than rollout.max_new_tokens {longest}; it is a "
            "part of it"
        )
    return problems


_LOSS_OPTIONS = {"sapo": ("tau_positive", "tau_negative")}


def _mask_problems(policy: PolicyConfig) -> list[str]:
    if policy.importance_mask is None:
        return []
    low, high = policy.importance_mask
    problems = []
    if not 0.0 <= low < 1.0 < high:
        problems.append(
            f"policy.importance_mask: [{low:g}, {high:g}]; expected 0 <= low < 1 < high, since a token on which "
            "trainer and engine agree has the ratio 1"
        )
    if policy.old_logprobs == "rollout":
        problems.append(
            f"policy.importance_mask: [{low:g}, {high:g}] with policy.old_logprobs rollout, whose old "
            "log-probs are the engine's, so that the ratio is always 1. Use recompute or on_policy, or null"
        )
    return problems


def _optimizer_problems(config: RunConfig) -> list[str]:
    optimizer = config.optimizer
    problems = []
    if optimizer.overlap_param_gather:
        missing = [name for name in ("distributed", "overlap_grad_reduce") if not getattr(optimizer, name)]
        if missing:
            problems.append(
                "optimizer.overlap_param_gather: true needs "
                + " and ".join(f"optimizer.{name}: true" for name in missing)
            )
    if optimizer.min_lr > optimizer.lr:
        problems.append(f"optimizer.min_lr: {optimizer.min_lr:g} is above optimizer.lr {optimizer.lr:g}")
    total = optimizer_steps(config)
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= total:
        problems.append(
            f"optimizer.warmup_steps: {optimizer.warmup_steps} leaves nothing for the {optimizer.schedule} "
            f"schedule: run.steps {config.run.steps} x policy.epochs {config.policy.epochs} x "
            f"policy.minibatches {config.policy.minibatches} = {total} optimizer steps"
        )
    return problems


def _parallel_problems(config: RunConfig) -> list[str]:
    parallel = config.parallel
    problems = []
    if parallel.sequence and parallel.tensor == 1:
        problems.append("parallel.sequence: true needs parallel.tensor above 1, got 1")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        problems.append(
            f"parallel.virtual_pipeline: {parallel.virtual_pipeline} needs parallel.pipeline above 1, got 1"
        )
    return problems


def _batch_problems(config: RunConfig) -> list[str]:
    problems = []
    pad, needed = config.batching.pad_multiple, needed_pad_multiple(config.parallel)
    if pad is not None and pad % needed:
        problems.append(
            f"batching.pad_multiple: {pad} is not divisible by {needed}, into which {_packed_cuts(config.parallel)} "
            f"packed sequences: {pad} % {needed} = {pad % needed}; use a multiple of it, or null"
        )
    longest = longest_sequence(config)
    if micro_batch_tokens(config) >= longest:
        return problems
    budget, context = config.batching.tokens_per_micro_batch, config.parallel.context
    product = f" x parallel.context {context} = {budget * context}" if context > 1 else ""
    least = -(-longest // budget)
    return [
        *problems,
        f"batching.tokens_per_micro_batch: {budget}{product} is less than the longest sequence, "
        f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_new_tokens "
        f"{config.rollout.max_new_tokens} = {longest}; every sequence must fit: use {-(-longest // context)} or more, "
        f"or parallel.context {least} ({budget} x {least} = {budget * least})",
    ]


def _packed_cuts(parallel: ParallelConfig) -> str:
    """What cuts packed sequences, with its verb."""
    context = f"parallel.context {parallel.context} (two chunks a rank)" if parallel.context > 1 else ""
    sequence = f"parallel.tensor {parallel.tensor} with parallel.sequence" if parallel.sequence else ""
    if context and sequence:
        return f"{context} and {sequence} divide"
    return f"{context or sequence} divides"
