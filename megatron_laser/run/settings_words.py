"""A run's settings in words, a line each: what somebody wants to know who looks at its log. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_laser.config import (
    Architecture,
    RunConfig,
    count_parameters,
    evaluation_max_new_tokens,
    optimizer_steps,
)
from megatron_laser.config.derived import data_sources, micro_batch_tokens
from megatron_laser.config.modes import batches_folder, generates, mode_words, trains
from megatron_laser.config.readouts import Readout, readouts

_LABEL = 11  # columns
_MOST = 8  # files and servers that are named


def settings_in_words(
    config: RunConfig,
    architecture: Architecture,
    *,
    ranks: int,
    device: str,
    layers: str,
    score_token_id: int | None,
    servers: Sequence[str],
) -> dict[str, str]:
    """What each line is about, and what it says.

    Args:
        layers: what the model's layers are made of, in words.
        servers: their addresses, where servers generate.
    """
    made_up = " (made-up weights)" if config.run.fake.weights else ""
    told = {
        "mode": mode_words(config),
        "model": f"{config.model.path}: {architecture.model_type}, {count_parameters(architecture):,} parameters, "
        f"{config.model.dtype}{made_up}; layers of {layers}",
        "engine": _engine(config, servers),
        "layout": _layout(config, ranks, device),
        "batch": _batch(config),
        "reward": _reward(config),
        **_score(config, score_token_id),
        "policy": _policy(config),
        "optimizer": _optimizer(config),
        "evaluates": _evaluates(config),
        "saves": _saves(config),
        "writes": _writes(config),
    }
    return {label: text for label, text in told.items() if text}


def plain_value(value: Any) -> str:
    """A setting's value as one would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(plain_value, value)) + "]"
    return str(value)


def _engine(config: RunConfig, servers: Sequence[str]) -> str:
    rollout = config.rollout
    if not generates(config):
        return "none: responses are made up" if config.run.fake.responses else f"none: {config.run.batches}"
    if rollout.engine == "in_process":
        return f"in rank 0's process, up to {rollout.max_batch_size} responses at once"
    checked = ", each sync verified" if rollout.verify_sync else ""
    router = f" behind {rollout.sglang.router_url}" if rollout.sglang.router_url else ""
    ahead = f"; rollout.ahead {rollout.ahead}" if rollout.ahead else ""
    return (
        f"{count(len(servers), 'SGLang server')}{router}: {listed(servers)}; weights by {rollout.weight_sync}"
        f"{checked}{ahead}"
    )


def _layout(config: RunConfig, ranks: int, device: str) -> str:
    parallel = config.parallel
    sizes = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
    }
    data = ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return f"{count(ranks, 'rank')} on {device}: {', '.join([*parts, f'data-parallel {data}'])}"


def _batch(config: RunConfig) -> str:
    rollout, policy = config.rollout, config.policy
    responses = rollout.prompts_per_step * rollout.samples_per_prompt
    updates = policy.minibatches * policy.epochs
    each = f"{count(updates, 'optimizer step')} of {responses // policy.minibatches:,}"
    epochs = f" in {policy.epochs} passes" if policy.epochs > 1 else ""
    return (
        f"{rollout.prompts_per_step:,} prompts x {rollout.samples_per_prompt} samples = {responses:,} responses a "
        f"step of up to {rollout.max_new_tokens:,} tokens; {each}{epochs}; micro-batches of up to "
        f"{micro_batch_tokens(config):,} tokens"
    )


def _reward(config: RunConfig) -> str:
    if not generates(config):
        return ""
    functions = list(dict.fromkeys(source.reward for source in data_sources(config, "train")))
    reward = config.reward
    return f"{listed(functions)}; {count(reward.workers, 'worker')}, {reward.deadline:g} s for a response"


def _score(config: RunConfig, token_id: int | None) -> dict[str, str]:
    """A line for each readout."""
    found = readouts(config)
    if not found:
        return {"LaSeR": "off: plain policy gradient, no scores"}
    several = len(found) > 1 or config.laser.readouts is not None
    return {
        (f"readout {one.name}" if several else "LaSeR"): _readout(
            config, one, token_id if place == 0 else None
        )
        for place, one in enumerate(found)
    }


def _readout(config: RunConfig, one: Readout, token_id: int | None) -> str:
    laser, steps = config.laser, config.run.steps
    token = " and ".join(map(str, one.tokens)) if one.tokens else str(laser.score_token)
    if token_id is not None and len(one.tokens) < 2 and token != str(token_id):
        token += f" (id {token_id})"
    measured = "the reference model" if one.reference == "model" else f"c_ref {plain_value(one.ref_logprob)}"
    return (
        f"alpha {one.weight:g}, beta_v {one.beta:g}, {measured}, score token {token} read by the "
        f"{laser.score_source}; loss {one.loss} {_from(one.first_step, steps)}, advantages "
        + (f"tau {one.tau:g} " if one.advantages == "mix" else "")
        + _from(one.advantages_first_step, steps)
    )


def _from(step: int | None, steps: int) -> str:
    if step is None:
        return "never"
    return f"from step {step} on" + (f" (the run has {steps})" if step > steps else "")


def _policy(config: RunConfig) -> str:
    policy = config.policy
    parts = [
        f"{policy.advantage} advantages",
        f"{policy.loss} loss, clip {policy.clip_low:g} / {policy.clip_high:g}",
        f"old log-probs {policy.old_logprobs}",
    ]
    if policy.kl_coefficient:
        parts.append(f"KL {policy.kl_coefficient:g} ({policy.kl_estimator})")
    if policy.entropy_coefficient:
        parts.append(f"entropy {policy.entropy_coefficient:g}")
    if policy.importance_cap:
        parts.append(f"importance cap {policy.importance_cap:g}")
    return ", ".join(parts)


def _optimizer(config: RunConfig) -> str:
    if not trains(config):
        return "none: nothing is trained"
    settings = config.optimizer
    schedule: str = settings.schedule
    if schedule != "constant":
        schedule += f" to {settings.min_lr:g} at optimizer step {optimizer_steps(config):,}"
    warmup = f" after {count(settings.warmup_steps, 'step')} of warm-up" if settings.warmup_steps else ""
    clip = f"gradient norm up to {settings.grad_clip:g}" if settings.grad_clip else "no clipping"
    return f"AdamW, lr {settings.lr:g} {schedule}{warmup}, weight decay {settings.weight_decay:g}, {clip}"


def _evaluates(config: RunConfig) -> str:
    settings, data = config.evaluation, config.data
    parts = []
    if data.validation is not None and settings.every:
        parts.append(
            f"validation every {count(settings.every, 'step')} ({count(settings.samples_per_prompt, 'response')} a "
            "problem)"
        )
    if data.test is not None:
        parts.append(
            f"test after the last step ({count(settings.final_samples_per_prompt, 'response')} a problem)"
        )
    if not parts:
        return "nothing"
    if settings.baseline:
        parts.append("both before step 1" if len(parts) > 1 else "and before step 1")
    return f"{', '.join(parts)}; up to {evaluation_max_new_tokens(config):,} tokens"


def _saves(config: RunConfig) -> str:
    settings = config.checkpoint
    where = settings.folder or f"{config.run.output_dir}/checkpoints"
    if not settings.every:
        text = "no checkpoints but when it is stopped"
    else:
        kept = f"the last {settings.keep_last}" if settings.keep_last > 1 else "the last one"
        if settings.keep_every:
            kept += f" and every {settings.keep_every}th"
        how = " in the background" if settings.asynchronous else ""
        text = f"every {count(settings.every, 'step')}{how} and at the end to {where}, kept: {kept}"
    return text + ("; hf/ at the end" if settings.export_hf else "")


def _writes(config: RunConfig) -> str:
    logging = config.logging
    parts = ["metrics.jsonl", "events.jsonl"]
    if logging.rollouts_every:
        parts.append(f"rollouts/ every {count(logging.rollouts_every, 'step')}")
    if logging.record_batches_every:
        parts.append(f"{batches_folder(config).name}/ every {count(logging.record_batches_every, 'step')}")
    parts += ["tensorboard/"] * logging.tensorboard + ["wandb"] * logging.wandb
    return ", ".join([*parts, "report.md at the end"])


def count(number: int, what: str) -> str:
    """1 step, 2,000 steps."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def listed(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    shown = ", ".join(names[:_MOST])
    return shown + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")


def labelled(told: Sequence[tuple[str, str]], width: int | None = None) -> list[str]:
    """Lines of labels and texts, broken at `width` columns; None: each is one line, as a log wants it."""
    lines: list[str] = []
    for label, text in told:
        if width is None:
            lines.append(f"{label:<{_LABEL}}{text}")
            continue
        lines += textwrap.wrap(
            text,
            width,
            initial_indent=f"{label:<{_LABEL}}",
            subsequent_indent=" " * _LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines
