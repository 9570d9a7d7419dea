"""What a dry run says about what is on: rollouts and weight sync, losses and passes, evaluation, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

from megatron_laser.config.checks.rollout import off_policy_reason
from megatron_laser.config.derived import (
    function_deadline,
    longest_sequence,
    old_policy_pass_kind,
    optimizer_steps,
    reference_model_reasons,
)
from megatron_laser.config.model_folder.continuation import longest_trained, planned_ids
from megatron_laser.config.modes import mode_words
from megatron_laser.config.plan.readout_features import readout_features
from megatron_laser.config.readouts import forced_text, readouts
from megatron_laser.config.schema.rollout import RolloutConfig
from megatron_laser.config.schema.root import RunConfig


@dataclass(frozen=True, slots=True)
class Feature:
    """One part of the algorithm: whether this run uses it, and from when or why (not)."""

    name: str
    on: bool
    detail: str


def run_features(config: RunConfig) -> tuple[Feature, ...]:
    """What is on in a run and what is not, in the order in which a dry run shows it."""
    laser, policy = config.laser, config.policy
    reasons = reference_model_reasons(config)
    passes = {
        "full": "policy.old_logprobs is recompute: one no-grad pass before the update",
        "score_rows": f"policy.old_logprobs is {policy.old_logprobs}, but "
        + (
            f"laser.score_source trainer needs a no-grad pass whose head runs on {_score_rows(config)} only"
            if laser.enabled and laser.score_source == "trainer"
            else "moe.aux_loss_coefficient needs a no-grad pass that counts the experts' tokens"
        ),
        "none": f"policy.old_logprobs is {policy.old_logprobs}"
        + (" and the engine computes the scores" if laser.enabled else ""),
    }
    old_pass = old_policy_pass_kind(config)
    cap = policy.importance_cap
    mode = mode_words(config)
    return (
        *((Feature("mode", True, mode),) if mode else ()),
        *(Feature(*line) for line in rollout_features(config)),
        *(Feature(*line) for line in readout_features(config)),
        Feature(
            "KL loss", policy.kl_coefficient > 0, _coefficient(policy.kl_coefficient, policy.kl_estimator)
        ),
        Feature("entropy bonus", policy.entropy_coefficient > 0, _coefficient(policy.entropy_coefficient)),
        Feature(
            "reference model",
            bool(reasons),
            "loaded: " + "; ".join(reasons) if reasons else "not loaded: no KL and a constant reference",
        ),
        Feature("old-policy pass", old_pass != "none", passes[old_pass]),
        *_router_features(config),
        *_forced_features(config),
        Feature("importance correction", cap is not None, f"cap {cap:g}" if cap is not None else "no cap"),
        Feature(
            "evaluation",
            config.evaluation.every > 0,
            f"every {config.evaluation.every} steps" if config.evaluation.every else "evaluation.every is 0",
        ),
        Feature(
            "final evaluation",
            config.data.test is not None,
            f"{config.evaluation.final_samples_per_prompt} responses per problem of data.test"
            if config.data.test is not None
            else "data.test is null",
        ),
        Feature(
            "optimizer",
            True,
            f"{optimizer_steps(config)} steps, lr {config.optimizer.lr:g} {config.optimizer.schedule}"
            + (", distributed" if config.optimizer.distributed else ""),
        ),
    )


def rollout_features(config: RunConfig) -> list[tuple[str, bool, str]]:
    """(name, whether it is on, detail) of each line."""
    rollout = config.rollout
    if rollout.engine == "none":
        return [("rollout", False, "nothing is generated")]
    if rollout.engine == "in_process":
        detail = f"rank 0 generates, up to {rollout.max_batch_size} sequences at once, from its own copy of the weights"
        return [("rollout", True, f"in_process: {detail}"), *_function(config)]
    reason = off_policy_reason(rollout)
    return [
        ("rollout", True, f"sglang: {_servers(rollout)}"),
        *_function(config),
        ("weight sync", True, _sync(rollout)),
        *_quantization(rollout),
        (
            "off-policy rollout",
            reason is not None,
            f"{reason}; tokens are at most {rollout.max_staleness} steps old"
            if reason is not None
            else "none: every response comes from the weights that are trained on it",
        ),
    ]


def _function(config: RunConfig) -> list[tuple[str, bool, str]]:
    """Nothing where the policy answers in one piece."""
    rollout, seconds = config.rollout, function_deadline(config)
    if rollout.function is None:
        return []
    detail = f"{rollout.function} makes each sample, in rank 0's process, in at most {seconds:g} s"
    return [("rollout function", True, detail)]


def _servers(rollout: RolloutConfig) -> str:
    sglang = rollout.sglang
    if sglang.urls is not None:
        router = ", generation through the router" if sglang.router_url is not None else ""
        return f"{_count(len(sglang.urls), 'server')} at the addresses of rollout.sglang.urls{router}"
    if sglang.device == "cpu":
        size = f"{_count(sglang.servers, 'server')} on the CPU"
    else:
        size = (
            f"{_count(sglang.servers, 'server')} x {_count(sglang.tensor, 'GPU')} = "
            f"{_count(sglang.servers * sglang.tensor, 'GPU')}"
        )
    router = ", behind a router" if sglang.router else ""
    if sglang.endpoints is None:
        return f"{size} on rank 0's node, started by the run{router}"
    return (
        f"{size} on each node that runs `megatron-laser serve`{router}; found in {sglang.endpoints}; goes on with "
        f"{rollout.min_servers} or more"
    )


def _sync(rollout: RolloutConfig) -> str:
    if rollout.weight_sync == "disk":
        return f"disk: a folder in {rollout.sync_folder or 'run.output_dir/weights'}, which servers must see"
    buckets = f"buckets of {rollout.sync_bucket_mib:,} MiB, two of them on rank 0"
    if rollout.weight_sync == "colocated":
        return f"colocated: trainer and servers share GPUs and offload in turn, not proven on GPUs yet; {buckets}"
    if rollout.weight_sync != "distributed":
        assert_never(rollout.weight_sync)
    return f"distributed: broadcast from rank 0, {buckets}"


def _quantization(rollout: RolloutConfig) -> list[tuple[str, bool, str]]:
    """Nothing where servers hold the trainer's weights."""
    if rollout.sglang.quantization is None:
        return []
    return [
        (
            "FP8 rollout",
            True,
            "matrices are quantized at each sync in blocks of 128 x 128, not proven on GPUs yet; judged by "
            "logprob_diff_mean and rollout_k3_kl",
        )
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _router_features(config: RunConfig) -> Iterator[Feature]:
    """What `moe` asks of a model with experts; nothing of what is off, which a dense model has not."""
    moe = config.moe
    if moe.aux_loss_coefficient:
        yield Feature(
            "load-balancing loss", True, f"coefficient {moe.aux_loss_coefficient:g}, over whole steps"
        )
    if moe.z_loss_coefficient:
        yield Feature("router z-loss", True, f"coefficient {moe.z_loss_coefficient:g}")
    if moe.freeze_router:
        yield Feature("frozen routers", True, "as in model.path")
    if moe.routing_replay:
        detail = "tokens go to the experts that the rollout engine chose"
        if config.rollout.engine == "sglang":
            detail += ", of servers started with --enable-return-routed-experts"
        yield Feature("routing replay", True, detail)


def _score_rows(config: RunConfig) -> str:
    at_end = all(readout.position == "eos" for readout in readouts(config))
    return "the EOS rows" if at_end else "the rows that readouts read"


def _coefficient(value: float, kind: str = "") -> str:
    return f"coefficient {value:g}" + (f", {kind}" if kind and value > 0 else "")


def _forced_features(config: RunConfig) -> Iterator[Feature]:
    text = forced_text(config)
    if text:
        names = ", ".join(readout.name for readout in readouts(config) if readout.forced)
        tokens = longest_trained(config) - longest_sequence(config)
        words = (
            f"{'at most ' if planned_ids(config) is None else ''}{tokens:,} token{'s' if tokens > 1 else ''}"
        )
        detail = f"{text!r}, {words} behind responses that were cut off, read by {names}"
        yield Feature("forced text", True, detail)
