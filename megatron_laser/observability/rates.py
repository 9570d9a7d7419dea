"""What a step's speed comes to: FLOPs by the model's shape and the real lengths, tokens a second of each side, MFU.

Model FLOPs are those that the definition of a step needs, as in PaLM (arXiv 2204.02311, appendix B), so that they do
not depend on how it is computed: what `model.recompute` computes twice and what padding adds is not counted, and a
prompt that is packed once for its group (`batching.share_prompts`) counts with every response. Attention is causal: a
token has products with itself and those before it. Of experts a token counts those that it goes to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_laser.config import Architecture, RunConfig
from megatron_laser.config.derived import needs_reference_model, old_policy_pass_kind
from megatron_laser.config.model_folder.flops import forward_flops, training_flops
from megatron_laser.types import Group

VARYING = ("time/", "memory/", "rate/", "mfu/", "servers/", "idle/", "plan/", "straggler/")
"""Prefixes of metrics that depend on the machine and its clock: two equal runs differ in nothing else."""

GENERATED = "rate/generated_tokens"


@dataclass(frozen=True)
class Devices:
    """GPUs (on a CPU, processes) of each side.

    trainer: ranks. servers: of all servers; in process rank 0's. all: of both, shared ones once.
    """

    trainer: int
    servers: int
    all: int

    @classmethod
    def of(cls, config: RunConfig, ranks: int, server_gpus: int) -> Devices:
        """Args: server_gpus: servers x their tensor size; 0 without servers."""
        if not server_gpus:
            return cls(ranks, 1, ranks)
        shared = config.rollout.weight_sync == "colocated"
        return cls(ranks, server_gpus, max(ranks, server_gpus) if shared else ranks + server_gpus)


@dataclass(frozen=True)
class StepWork:
    """What one step had to do, by the model's definition.

    tokens: prompt and response tokens of the batch; sampled: those that the policy sampled, in the batch.
    generate, logprob, train: FLOPs; of train once through the batch, forward and backward.
    """

    tokens: int
    sampled: int
    generate: float
    logprob: float
    train: float


def step_work(config: RunConfig, architecture: Architecture, groups: Sequence[Group]) -> StepWork:
    """Of a batch.

    Every sample is a sequence of its own, with a row of the vocabulary projection for each token that the policy
    sampled and for the score token behind a scored response. `logprob` has the forwards that are made without
    gradients: of the old policy (its body alone with `old_logprobs: rollout`, where scores are read) and of the
    reference model. `generate` has a group's prompt once, as a prefix cache gives it to the other samples, and each
    response behind it; servers' reads of scores are left out.
    """
    kind = old_policy_pass_kind(config)
    reads_scores = config.laser.enabled
    tokens = sampled = 0
    generate = logprob = train = 0.0
    for group in groups:
        prompt = len(group.prompt.token_ids)
        generate += forward_flops(architecture, prompt, 0)
        for sample in group.samples:
            length, score = sample.length, int(reads_scores and sample.scored)
            own = int(sample.generation.sampled_mask.sum())
            tokens += length
            sampled += own
            begin = len(sample.prompt_ids)
            if length > begin:  # the last token is sampled, and not fed
                behind = forward_flops(architecture, length - 1, own)
                generate += behind - forward_flops(architecture, begin, 0)
            train += training_flops(architecture, length, own + score)
            if kind != "none":
                logprob += forward_flops(architecture, length, score + own * (kind == "full"))
            if needs_reference_model(config):
                logprob += forward_flops(architecture, length, own + score)
    return StepWork(tokens, sampled, generate, logprob, train)


def rate_metrics(
    work: StepWork,
    devices: Devices,
    metrics: Mapping[str, float],
    *,
    passes: float,
    peaks: tuple[float, float] | None = None,
) -> dict[str, float]:
    """`rate/...` and `mfu/...`; what took no time is left out.

    Args:
        metrics: seconds of the step's phases under time/, and `GENERATED`: the tokens that were generated for it, of
            dropped and unfinished responses too.
        passes: how often the optimizer went through the batch: `policy.epochs`, less what was given up unseen.
        peaks: FLOP/s of a trainer's and of a server's device; None: unknown, and there is no MFU.
    """
    seconds = {name: metrics.get(f"time/{name}", 0.0) for name in ("total", "generate", "logprob", "train")}
    generated = metrics.get(GENERATED, float(work.sampled))
    found = {
        "rate/flops_per_token": _over(work.train, work.tokens),
        "rate/tokens_per_second_gpu": _over(work.tokens, seconds["total"] * devices.all),
        "rate/tokens_per_second_trainer_gpu": _over(
            work.tokens, (seconds["logprob"] + seconds["train"]) * devices.trainer
        ),
        "rate/tokens_per_second_server_gpu": _over(generated, seconds["generate"] * devices.servers),
    }
    if peaks is not None:
        trainer, server = (devices.trainer * peaks[0], devices.servers * peaks[1])
        # Responses that are not in the batch are taken to be as long as those that are.
        generate = work.generate * generated / max(1, work.sampled)
        found |= {
            "mfu/train": _over(work.train * passes, seconds["train"] * trainer),
            "mfu/logprob": _over(work.logprob, seconds["logprob"] * trainer),
            "mfu/generate": _over(generate, seconds["generate"] * server),
        }
    return {name: value for name, value in found.items() if value > 0.0 and math.isfinite(value)}


def idle_metrics(
    metrics: Mapping[str, float], *, waited: float, busy: float | None = None
) -> dict[str, float]:
    """`idle/trainer` and `idle/servers`, shares of the step; {} without a step's seconds.

    Args:
        metrics: time/...
        waited: seconds in which the trainer waited for rollouts.
        busy: seconds in which a server had something to do, mean over servers; None: not known, and taken to be those
            in which something was generated, as it is in process.
    """
    total = metrics.get("time/total", 0.0)
    if total <= 0.0:
        return {}
    busy = metrics.get("time/generate", 0.0) if busy is None else busy
    return {"idle/trainer": _share(waited / total), "idle/servers": _share(1.0 - busy / total)}


def speed_fields(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What a line of a step says of its speed beside tokens a second: MFU of the updates, and servers that idle."""
    if is_number(mfu := metrics.get("mfu/train")):
        yield f"MFU {mfu:.0%}"
    if "servers/utilisation" in metrics and is_number(idle := metrics.get("idle/servers")):
        yield f"servers idle {idle:.0%}"


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _over(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0.0 else 0.0


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))
