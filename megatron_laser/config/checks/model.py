"""Whether a model fits the lengths and the split of a run, on any number of ranks."""

from __future__ import annotations

from megatron_laser.config.derived import evaluation_max_new_tokens
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.schema.root import RunConfig


def split_problems(config: RunConfig, architecture: Architecture) -> list[str]:
    """Parts of this model that `parallel.tensor` and the pipeline do not divide, on any number of ranks."""
    parallel = config.parallel
    problems = []
    for name, value in (
        ("num_attention_heads", architecture.num_attention_heads),
        ("num_key_value_heads", architecture.num_key_value_heads),
        ("hidden_size", architecture.hidden_size),
        ("intermediate_size", architecture.intermediate_size),
    ):
        problems += divisible(name, value, "parallel.tensor", parallel.tensor)
    chunks = parallel.pipeline * parallel.virtual_pipeline
    label = "parallel.pipeline"
    if parallel.virtual_pipeline > 1:
        label = f"parallel.pipeline {parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline} ="
    problems += divisible("num_hidden_layers", architecture.num_layers, label, chunks)
    return problems


def position_problems(config: RunConfig, architecture: Architecture) -> list[str]:
    """Longest sequences for which the model has no positions; one line each, with the arithmetic."""
    limit = architecture.max_position_embeddings
    problems = []
    prompt = config.data.max_prompt_tokens
    for name, new in (
        ("rollout.max_new_tokens", config.rollout.max_new_tokens),
        ("evaluation.max_new_tokens", evaluation_max_new_tokens(config)),
    ):
        if name.startswith("evaluation") and config.evaluation.max_new_tokens is None:
            continue  # the rollout's, said already
        if prompt + new > limit:
            problems.append(
                f"data.max_prompt_tokens {prompt} + {name} {new} = {prompt + new} is more than the model's "
                f"max_position_embeddings {limit}"
            )
    return problems


def divisible(name: str, value: int, divisor_name: str, divisor: int) -> list[str]:
    """[] where `divisor` divides `value`; else one line with the arithmetic."""
    rest = value % divisor
    if rest == 0:
        return []
    return [f"{name} {value} is not divisible by {divisor_name} {divisor}: {value} % {divisor} = {rest}"]
