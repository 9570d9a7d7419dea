"""What `run.mode`, `run.fake` and `rollout.limit` make of the other settings, and what they cannot be combined with.

`load_config` applies `as_run`, so that everybody else reads what will run: checks, the dry run, config.yaml, the loop.
Applied to its own result it changes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_laser.config.schema.keeping import BestConfig, EarlyStopConfig
from megatron_laser.config.schema.rollout import RolloutConfig
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.schema.sources import Setting, listed_sources

FAKE = "FAKE"
"""In the name of a run with made-up weights or responses, and so in its live view and in the title of its report."""
_SMOKE = "-smoke"
_SMOKE_STEPS, _SMOKE_TOKENS, _SMOKE_SAMPLES = 3, 256, 2


def as_run(config: RunConfig) -> RunConfig:
    """The settings that a run really has."""
    if config.rollout.limit is not None:
        config = _limited(config, config.rollout.limit)
    if config.run.mode != "train" or config.run.fake.responses:
        config = _without_evaluations(config)
    if config.run.mode == "rollout_only":
        # They would be copies of model.path.
        config = _with(config, "checkpoint", export_hf=False, export_every=0, export_keep=None)
        config = _with(config, "laser", drift_every=0)
        config = _with(config, "logging", record_batches_every=1)
    if not generates(config):
        config = _without_engine(config)
    if config.run.fake.responses:
        config = _with(
            config, "logging", rollouts_tokens=False
        )  # there may be no tokenizer to spell noise with
    if is_fake(config) and not config.run.name.startswith(FAKE):
        config = _with(config, "run", name=f"{FAKE} {config.run.name}")
    return config


def trains(config: RunConfig) -> bool:
    """Whether weights change: not in `rollout_only`, whose responses are never too old."""
    return config.run.mode != "rollout_only"


def generates(config: RunConfig) -> bool:
    """Whether responses are sampled from the policy: not where they are recorded or made up."""
    return config.run.mode != "train_only" and not config.run.fake.responses


def is_fake(config: RunConfig) -> bool:
    """Whether nothing that the run measures says anything about a model but its time and memory."""
    return config.run.fake.weights or config.run.fake.responses


def mode_words(config: RunConfig) -> str:
    """What is not as in an ordinary run, in one sentence; "" for one."""
    run, parts = config.run, []
    if run.mode == "rollout_only":
        parts.append(
            f"rollout_only: responses go to {run.output_dir}/batches, nothing is trained, weights stay those of "
            "model.path"
        )
    if run.mode == "train_only":
        parts.append(f"train_only: trains on the batches in {run.batches}; no rollouts and no evaluations")
    made_up = [what for what in ("weights", "responses") if getattr(run.fake, what)]
    if made_up:
        parts.append(f"{FAKE}: {' and '.join(made_up)} are made up; only times and memory mean anything")
    if config.rollout.limit is not None:
        parts.append(
            f"rollout.limit {config.rollout.limit}: a smoke run of {config.run.steps} steps with "
            f"{config.rollout.prompts_per_step} prompts each and at most {config.rollout.max_new_tokens} tokens a "
            "response"
        )
    return "; ".join(parts)


def mode_problems(config: RunConfig) -> list[str]:
    """What these settings cannot be combined with; one line each."""
    run, rollout, problems = config.run, config.rollout, []
    if run.mode == "train_only" and run.batches is None:
        problems.append(
            "run.mode: train_only needs run.batches, the folder of the batches to train on: another run's "
            "OUTPUT_DIR/batches"
        )
    if run.mode == "train_only" and run.batches is not None and _is_inside(run.batches, run.output_dir):
        problems.append(
            f"run.batches: {run.batches} is in run.output_dir {run.output_dir}, where this run would write over it; "
            "choose another run.output_dir"
        )
    if run.mode != "train_only" and run.batches is not None:
        problems.append(
            f"run.batches: {run.batches} with run.mode {run.mode}, which does not read it; use train_only, or null"
        )
    if rollout.engine == "none" and generates(config):
        problems.append(
            "rollout.engine: none is for runs in which nothing is generated (run.mode: train_only, "
            "run.fake.responses: true); use in_process or sglang"
        )
    if run.mode == "rollout_only" and rollout.engine == "sglang" and rollout.weight_sync == "colocated":
        problems.append(
            "run.mode: rollout_only with rollout.weight_sync colocated: servers would give their GPUs to a trainer "
            "that does not train; use weight_sync: distributed or disk"
        )
    if run.fake.responses and run.mode != "train":
        problems.append(f"run.fake.responses: true with run.mode {run.mode}; made-up responses are for train")
    if run.fake.responses and config.logging.record_batches_every:
        problems.append(
            f"logging.record_batches_every: {config.logging.record_batches_every} with run.fake.responses: true; "
            "made-up responses are not kept: use 0"
        )
    if run.fake.weights and run.mode == "rollout_only":
        problems.append(
            "run.fake.weights: true with run.mode rollout_only; responses of random weights say nothing"
        )
    if run.fake.weights and rollout.engine == "sglang":
        problems.append(
            "run.fake.weights: true with rollout.engine sglang: servers read the files of model.path; set "
            "run.fake.responses: true as well, or rollout.engine: in_process"
        )
    steps = config.logging.profile.steps
    if steps is not None and steps[1] > run.steps:
        problems.append(
            f"logging.profile.steps: [{steps[0]}, {steps[1]}] ends after run.steps {run.steps}; the window must lie "
            "within them"
        )
    return problems


def profiled_rank_problems(config: RunConfig, world_size: int) -> list[str]:
    """Ranks of `logging.profile` that the run does not have."""
    ranks = config.logging.profile.ranks
    beyond = [] if ranks == "all" else [rank for rank in ranks if rank >= world_size]
    if not beyond:
        return []
    return [
        f"logging.profile.ranks: rank {', '.join(map(str, beyond))} of {world_size} ranks, which are 0 to "
        f"{world_size - 1}; name some of them, or all"
    ]


def _limited(config: RunConfig, limit: int) -> RunConfig:
    rollout, laser, evaluation = config.rollout, config.laser, config.evaluation
    parts = config.policy.minibatches
    prompts = min(rollout.prompts_per_step, -(-limit // parts) * parts)
    steps, tokens = min(config.run.steps, _SMOKE_STEPS), min(rollout.max_new_tokens, _SMOKE_TOKENS)
    config = _with(config, "rollout", prompts_per_step=prompts, max_new_tokens=tokens)
    output = config.run.output_dir
    if not output.name.endswith(_SMOKE):
        output = output.with_name(output.name + _SMOKE)
    config = _with(config, "run", steps=steps, output_dir=output)
    readouts = laser.readouts
    if readouts is not None:
        names = ("warmup_steps", "advantages_warmup_steps")
        readouts = tuple(
            one.model_copy(update={name: _at_most(getattr(one, name), 1) for name in names})
            for one in readouts
        )
    config = _with(
        config,
        "laser",
        reasoning_warmup_steps=min(laser.reasoning_warmup_steps, 1),
        self_reward_warmup_steps=min(laser.self_reward_warmup_steps, 1),
        drift_samples=min(laser.drift_samples, prompts * rollout.samples_per_prompt),
        readouts=readouts,
    )
    config = _with(config, "policy", overlong_buffer=_at_most(config.policy.overlong_buffer, tokens))
    config = _with(config, "optimizer", warmup_steps=min(config.optimizer.warmup_steps, 1))
    config = _with(
        config,
        "evaluation",
        every=min(evaluation.every, steps),
        max_prompts=min(evaluation.max_prompts or limit, limit),
        samples_per_prompt=min(evaluation.samples_per_prompt, _SMOKE_SAMPLES),
        final_samples_per_prompt=min(evaluation.final_samples_per_prompt, _SMOKE_SAMPLES),
        max_new_tokens=_at_most(evaluation.max_new_tokens, tokens),
    )
    config = _with(
        config, "data", validation=_few(config.data.validation, limit), test=_few(config.data.test, limit)
    )
    profile = config.logging.profile
    if profile.steps is not None and profile.steps[1] > steps:
        profile = profile.model_copy(update={"steps": (steps, steps)})  # so that it is tried, too
    return _with(config, "logging", profile=profile)


def _few(setting: Setting | None, limit: int) -> Setting | None:
    """Sources with fewer problems and responses, where they say how many."""
    if not listed_sources(setting):
        return setting
    return tuple(
        source.model_copy(
            update={
                "max_prompts": _at_most(source.max_prompts, limit),
                "samples_per_prompt": _at_most(source.samples_per_prompt, _SMOKE_SAMPLES),
            }
        )
        for source in listed_sources(setting)
    )


def _at_most(value: int | None, limit: int) -> int | None:
    return None if value is None else min(value, limit)


def _without_evaluations(config: RunConfig) -> RunConfig:
    config = _with(config, "evaluation", every=0, baseline=False)
    config = _with(config, "checkpoint", best=BestConfig())
    config = _with(config, "run", early_stop=EarlyStopConfig())
    return _with(config, "data", validation=None, test=None)


def _without_engine(config: RunConfig) -> RunConfig:
    """Nobody generates: what concerns engine and servers is as if nothing had been said, and no alarm is of them."""
    kept = {"engine": "none", "ahead": 0, "oversample": 1.0, "function": None, "function_options": {}}
    for name in ("sglang", "weight_sync", "sync_folder", "function_deadline"):
        kept[name] = RolloutConfig.model_fields[name].get_default(call_default_factory=True)
    # Recorded batches bring along what their run said of its servers.
    config = _with(config, "alarms", server_deaths=None, servers_idle=None, trainer_idle=None)
    return _with(config, "rollout", **kept)


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, through whatever links."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def batches_folder(config: RunConfig) -> Path:
    """Where the run keeps batches."""
    return Path(config.run.output_dir) / "batches"
