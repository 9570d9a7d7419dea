"""What is kept with a recorded batch of the run that made it, and whether a run can train on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_laser.config import RunConfig, read_architecture

# A batch is cut, weighed and read by these: with others it would be another batch.
_ROLLOUT = (
    *("prompts_per_step", "samples_per_prompt", "max_new_tokens"),
    *("temperature", "top_p", "top_k", "min_p"),
)


def origin_of(
    config: RunConfig,
    *,
    stop_token_ids: Sequence[int],
    score_token_id: int | None,
    data_fingerprints: Sequence[str],
) -> dict[str, Any]:
    """What decides what the run's batches are, as JSON values; the rest as `RunInputs` has it."""
    return {
        "rollout": {name: getattr(config.rollout, name) for name in _ROLLOUT},
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "vocab_size": read_architecture(config.model.path).vocab_size,
        "stop_token_ids": list(stop_token_ids),
        # log pi of it is in the batch where the engine read it.
        "score_token_id": score_token_id if _engine_scores(config) else None,
        "routed_experts": config.moe.routing_replay,
        "model": str(config.model.path),
        "data_fingerprints": list(data_fingerprints),
        "reward": config.reward.function,
        "run": config.run.name,
        "mode": config.run.mode,
        "seed": config.run.seed,
    }


def origin_problems(
    config: RunConfig, origin: Mapping[str, Any], stop_token_ids: tuple[int, ...], score_token_id: int | None
) -> list[str]:
    """Why this run cannot train on a batch of that origin; one line each, with both values.

    Args:
        stop_token_ids, score_token_id: of this run.
    """
    problems = []
    for name in _ROLLOUT:
        there, here = origin["rollout"].get(name), getattr(config.rollout, name)
        if there != here:
            problems.append(
                f"they were made with rollout.{name} {_yaml(there)}, and this run has {_yaml(here)}"
            )
    vocab = read_architecture(config.model.path).vocab_size
    if origin["vocab_size"] != vocab:
        problems.append(
            f"their model has a vocabulary of {origin['vocab_size']:,}, and model.path {config.model.path} one of "
            f"{vocab:,}"
        )
    if origin["stop_token_ids"] != list(stop_token_ids):
        problems.append(
            f"their responses end in {origin['stop_token_ids']}, and this run's in {list(stop_token_ids)} "
            "(rollout.stop_token_ids)"
        )
    if origin["max_prompt_tokens"] > config.data.max_prompt_tokens:
        problems.append(
            f"their prompts have up to data.max_prompt_tokens {origin['max_prompt_tokens']}, and this run takes "
            f"{config.data.max_prompt_tokens}"
        )
    if _engine_scores(config) and origin["score_token_id"] != score_token_id:
        problems.append(
            "laser.score_source is server, which asks for the engine's log-probs of the score token "
            f"{score_token_id}, and they hold {'none' if origin['score_token_id'] is None else 'those of'} "
            f"{'' if origin['score_token_id'] is None else origin['score_token_id']}".rstrip()
            + "; use laser.score_source: trainer"
        )
    if config.moe.routing_replay and not origin["routed_experts"]:
        problems.append("moe.routing_replay is true, and they do not say which experts sampled; use false")
    return problems


def _engine_scores(config: RunConfig) -> bool:
    return config.laser.enabled and config.laser.score_source == "server"


def _yaml(value: Any) -> str:
    return "null" if value is None else f"{value}"
