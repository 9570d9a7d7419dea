"""Facts that follow from a configuration and that several modules need to agree on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from megatron_laser.config.readouts import readouts
from megatron_laser.config.schema.inputs import ModelConfig
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.schema.sources import EVALUATION_KEYS, DataSource, data_files, listed_sources
from megatron_laser.config.schema.system import ParallelConfig

OldPolicyPass = Literal["full", "score_rows", "none"]

_FUNCTION_SECONDS = 600.0
_GPU_PAD = 128  # tokens on a tensor-parallel and context-parallel rank


def reference_model_reasons(config: RunConfig) -> tuple[str, ...]:
    """The settings that make a frozen copy of the initial model necessary; empty when none is."""
    reasons = []
    if config.policy.kl_coefficient > 0:
        reasons.append(f"policy.kl_coefficient is {config.policy.kl_coefficient:g}")
    if config.laser.enabled and config.laser.reference == "model":
        reasons.append("laser.reference is model")
    return tuple(reasons)


def needs_reference_model(config: RunConfig) -> bool:
    """Whether a frozen copy of the initial model must be loaded; the paper's recipe needs none."""
    return bool(reference_model_reasons(config))


def old_policy_pass_kind(config: RunConfig) -> OldPolicyPass:
    """The trainer's no-grad pass before the update.

    "full": log-probs of all labelled rows (`old_logprobs: recompute`); "score_rows": only the EOS rows go
    through the head, for the scores; "none": no pass. The load-balancing loss of experts needs one, to count tokens.
    """
    if config.policy.old_logprobs == "recompute":
        return "full"
    scores = config.laser.enabled and config.laser.score_source == "trainer"
    if scores or config.moe.aux_loss_coefficient != 0:
        return "score_rows"
    return "none"


def self_reward_first_step(config: RunConfig) -> int | None:
    """First step (from 1) with a self-reward loss, perhaps beyond `run.steps`; None when LaSeR is off or
    its weights are 0."""
    return _first(readout.first_step for readout in readouts(config))


def mixing_first_step(config: RunConfig) -> int | None:
    """First step (from 1) in which scores change advantages, perhaps beyond `run.steps`; None when LaSeR is off or
    none does (tau is 0)."""
    return _first(readout.advantages_first_step for readout in readouts(config))


def _first(steps: Iterable[int | None]) -> int | None:
    return min((step for step in steps if step is not None), default=None)


def longest_sequence(config: RunConfig) -> int:
    """Tokens of the longest training sequence: prompt plus response."""
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens


def function_deadline(config: RunConfig) -> float:
    """Seconds for one sample of `rollout.function`."""
    rollout = config.rollout
    given = rollout.function_deadline
    return min(_FUNCTION_SECONDS, rollout.deadline / 2) if given is None else given


def rollout_tries(config: RunConfig) -> int:
    """Prompts that one step tries at most with `rollout.drop_uniform_groups`."""
    return int(config.rollout.oversampling_cap * config.rollout.prompts_per_step)


def optimizer_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole run."""
    return config.run.steps * config.policy.epochs * config.policy.minibatches


def evaluation_max_new_tokens(config: RunConfig) -> int:
    """`evaluation.max_new_tokens`, or the rollout's where that is null."""
    return config.evaluation.max_new_tokens or config.rollout.max_new_tokens


def recompute_words(model: ModelConfig) -> str:
    """`model.recompute` as one would say it."""
    return model.recompute if isinstance(model.recompute, str) else ", ".join(model.recompute)


def recomputed_of_experts(model: ModelConfig) -> list[str]:
    """Modules of `model.recompute` that only experts have, in Transformer Engine's layers."""
    return [name for name in ("layernorm", "moe_act") if name in model.recompute]


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens that one micro-batch may hold: `batching.tokens_per_micro_batch` on each context-parallel rank.

    The schedule fills micro-batches up to it, and the longest sequence must fit.
    """
    return config.batching.tokens_per_micro_batch * config.parallel.context


def shared_prompt_problems(config: RunConfig, *, experts: bool) -> list[str]:
    """Why prompts cannot be packed once for a group, apart from the kind of layers; one line each.

    Args:
        experts: whether the model has them.
    """
    problems = []
    if config.parallel.context > 1:
        problems.append(f"parallel.context is {config.parallel.context}, whose ranks split whole sequences")
    if experts:
        problems.append("the model has experts, whose routers count every sample's tokens")
    return problems


def context_multiple(parallel: ParallelConfig) -> int:
    """What each packed sequence is padded to a multiple of, in tokens: two chunks (zig-zag) for each context rank."""
    return 2 * parallel.context if parallel.context > 1 else 1


def padded_tokens(tokens: int, parallel: ParallelConfig) -> int:
    """Tokens that a sequence takes in a micro-batch, with its padding for context parallelism."""
    multiple = context_multiple(parallel)
    return -(-tokens // multiple) * multiple


def needed_pad_multiple(parallel: ParallelConfig) -> int:
    """What packed lengths must divide by: the chunks of the context ranks, and the sequence-parallel ranks that divide
    each context rank's tokens again."""
    sequence = parallel.tensor if parallel.sequence else 1
    return math.lcm(context_multiple(parallel), parallel.context * sequence)


def gpu_pad_multiple(config: RunConfig) -> int:
    """Tokens that packed lengths are padded to a multiple of on GPUs: `batching.pad_multiple` or its default there."""
    parallel = config.parallel
    default = math.lcm(_GPU_PAD * parallel.tensor * parallel.context, needed_pad_multiple(parallel))
    return config.batching.pad_multiple or default


def pipeline_bubble(parallel: ParallelConfig, micro_batches: Sequence[int]) -> float:
    """Share of a pipeline stage's time in which it waits, in optimizer steps of so many micro-batches of equal work.

    A stage of p works through m micro-batches and waits for p - 1 more, or for a v-th of them with v chunks of layers
    on each stage (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
    """
    waits = (parallel.pipeline - 1) / parallel.virtual_pipeline
    total = sum(count + waits for count in micro_batches)
    return len(micro_batches) * waits / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Source:
    """Problems that are read, drawn and counted together.

    name: "" where a split has one source only, which is then not told apart. share: of the prompts, exact; all of a
    split's add up to 1. reward: the verifier's name or place. samples_per_prompt, max_prompts, temperature: of its
    evaluation; None: those of `evaluation`.
    """

    name: str
    paths: tuple[Path, ...]
    share: Fraction
    reward: str
    samples_per_prompt: int | None = None
    max_prompts: int | None = None
    temperature: float | None = None


def data_sources(config: RunConfig, split: str) -> tuple[Source, ...]:
    """The sources of `data.train`, `data.validation` or `data.test`; () for a split that is not given."""
    setting = getattr(config.data, split)
    default = config.reward.function
    if setting is None:
        return ()
    listed = listed_sources(setting)
    if len(listed) < 2:
        reward = next((source.reward for source in listed if source.reward), default)
        own = _evaluated(listed[0]) if listed else {}
        return (Source("", data_files(setting), Fraction(1), reward, **own),)
    # As it is written: the weight 0.1 is a tenth, not the binary fraction next to it.
    weights = [Fraction(str(1.0 if source.weight is None else source.weight)) for source in listed]
    return tuple(
        Source(
            source.label, source.path, weight / sum(weights), source.reward or default, **_evaluated(source)
        )
        for source, weight in zip(listed, weights, strict=True)
    )


def _evaluated(source: DataSource) -> dict[str, Any]:
    return {name: getattr(source, name) for name in EVALUATION_KEYS}
