"""Token ids with a part in the algorithm: what ends a response, and the score token; one rule for dry run and run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.score_token import (
    ScoreToken,
    Vocabulary,
    named_eos_ids,
    resolve_score_token,
)
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """stop_token_ids: what ends a response. score_token: z_c, None where `laser.score_token` names none."""

    stop_token_ids: tuple[int, ...]
    score_token: ScoreToken | None

    @property
    def score_token_id(self) -> int | None:
        """Its id, where it is known."""
        return None if self.score_token is None else self.score_token.id


def resolve_stops(config: RunConfig, architecture: Architecture, *, complete: bool = True) -> tuple[int, ...]:
    """What ends a response: `rollout.stop_token_ids`, else what the model's files name.

    Args:
        complete: the folder is whole, so that what its files do not say is an error; a dry run needs only config.json.

    Raises:
        ConfigError: none is named where the folder is `complete`, or one is not in the vocabulary; has where it stands.
    """
    if config.rollout.stop_token_ids:
        stops = tuple(config.rollout.stop_token_ids)
        _check_vocabulary("rollout.stop_token_ids", stops, architecture.vocab_size)
        return stops
    for name, stops in named_eos_ids(config.model.path).items():
        file = Path(config.model.path) / name
        cure = "; correct it, or set rollout.stop_token_ids"
        _check_vocabulary("eos_token_id", stops, architecture.vocab_size, cure, source=str(file))
        return stops
    if complete:
        raise ConfigError(
            [f"model.path {config.model.path} names no eos_token_id; set rollout.stop_token_ids"]
        )
    return ()


def resolve_score(
    config: RunConfig,
    architecture: Architecture,
    stops: tuple[int, ...],
    *,
    vocabulary: Vocabulary | None = None,
    complete: bool = True,
) -> ScoreToken | None:
    """What `laser.score_token` names; None where it names none.

    Args:
        stops: what ends a response. vocabulary: of the folder's files; read here where it is not given.

    Raises:
        ConfigError: it has no id, one that is not in the vocabulary, or one of `stops`.
    """
    setting = config.laser.score_token
    if setting is None:
        return None
    token = resolve_score_token(config.model.path, setting, vocabulary)
    if token.id is None:
        if config.laser.enabled and complete:
            raise ConfigError(
                [
                    f"laser.score_token {setting!r} has no id in the tokenizer of {config.model.path}: {token.note}"
                ]
            )
        return token
    _check_vocabulary("laser.score_token", (token.id,), architecture.vocab_size)
    if token.id in stops:
        raise ConfigError(
            [
                f"laser.score_token {setting!r} is id {token.id}, which also ends a response (rollout.stop_token_ids "
                f"{list(stops)}); choose an unused special token"
            ]
        )
    return token


def _check_vocabulary(
    setting: str, ids: tuple[int, ...], vocab_size: int, cure: str = "", *, source: str = ""
) -> None:
    outside = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if outside:
        raise ConfigError(
            [
                f"{setting}: token id {outside[0]} is not in the model's vocabulary; expected 0 to {vocab_size - 1}"
                f"{cure}"
            ],
            source,
        )
