"""The user's files, read and checked on rank 0 before any model is built."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_laser.config import (
    ConfigError,
    RunConfig,
    read_architecture,
    read_stop_token_ids,
    resolve_score_token,
)
from megatron_laser.data import (
    Row,
    build_prompts,
    fingerprint,
    grades_mathematics,
    heed,
    look_at_references,
    read_rows,
    refuse_score_token,
)
from megatron_laser.output_folder import ClaimedFolder, claim_output_folder
from megatron_laser.rewards import try_reward
from megatron_laser.rollout.serving.start_checks import check_start
from megatron_laser.tokenizer import load_tokenizer
from megatron_laser.types import Prompt
from megatron_laser.weight_sync.feasibility import check_servers

logger = logging.getLogger(__name__)

_TOKENIZER_PROBES = 16


@dataclass(frozen=True)
class RunInputs:
    """The user's files, read and checked before any model is built."""

    tokenizer: Any
    train: list[Prompt]
    validation: list[Prompt] | None
    test: list[Prompt] | None
    score_token_id: int | None
    stop_token_ids: tuple[int, ...]
    data_fingerprint: str
    folder: ClaimedFolder

    def shared_arrays(self) -> dict[str, np.ndarray]:
        """What the other ranks need of it; -1 stands for no score token."""
        score = -1 if self.score_token_id is None else self.score_token_id
        finished = np.array(self.folder.finished)
        return {"score_token_id": np.array(score, dtype=np.int64), "finished": finished}


def read_inputs(config: RunConfig) -> RunInputs:
    """Read tokenizer and data, resolve score token and reward function, and claim the output folder.

    Raises:
        ConfigError, DataError, RewardSpecError: with the setting or the file and line that is wrong.
    """
    check_start(config)
    check_servers(config)
    architecture = read_architecture(config.model.path)
    stop_token_ids = config.rollout.stop_token_ids or read_stop_token_ids(config.model.path)
    if not stop_token_ids:
        raise ConfigError(
            [f"model.path {config.model.path} names no eos_token_id; set rollout.stop_token_ids"]
        )
    score_token_id = None
    if config.laser.score_token is not None:
        token = resolve_score_token(config.model.path, config.laser.score_token)
        score_token_id = token.id
        if not token.verified:
            logger.warning("laser.score_token %r is unverified: %s", config.laser.score_token, token.note)
    if config.laser.enabled and score_token_id is None:
        raise ConfigError(
            [
                f"laser.score_token {config.laser.score_token!r} has no id in the tokenizer of {config.model.path}"
            ]
        )
    _check_vocabulary("rollout.stop_token_ids", stop_token_ids, architecture.vocab_size)
    if score_token_id is not None:
        _check_vocabulary("laser.score_token", (score_token_id,), architecture.vocab_size)
        if score_token_id in stop_token_ids:
            raise ConfigError(
                [
                    f"laser.score_token {config.laser.score_token!r} is id {score_token_id}, which also ends a "
                    f"response (rollout.stop_token_ids {list(stop_token_ids)}); choose an unused special token"
                ]
            )
    data = config.data
    mathematics = grades_mathematics(config.reward.function)

    def read(split: str) -> list[Row] | None:
        paths = getattr(data, split)
        if paths is None:
            return None
        rows = read_rows(
            paths, prompt_key=data.prompt_key, answer_key=data.answer_key, mathematics=mathematics
        )
        if mathematics:
            heed(look_at_references(rows, name=f"data.{split}"))
        return rows

    train_rows = read("train") or []
    reward = config.reward
    try_reward(reward.function, train_rows[0].answer if train_rows else "42", deadline=reward.deadline)
    tokenizer = load_tokenizer(config.model.path, [row.problem for row in train_rows[:_TOKENIZER_PROBES]])

    def prompts(rows: list[Row] | None) -> list[Prompt] | None:
        if rows is None:
            return None
        built = build_prompts(
            rows,
            tokenizer,
            prompt_suffix=data.prompt_suffix,
            apply_chat_template=data.apply_chat_template,
            max_prompt_tokens=data.max_prompt_tokens,
            vocab_size=architecture.vocab_size,
        )[0]
        if score_token_id is not None:
            refuse_score_token(rows, built, tokenizer, score_token_id)
        return built

    train = prompts(train_rows) or []
    return RunInputs(
        tokenizer=tokenizer,
        train=train,
        validation=prompts(read("validation")),
        test=prompts(read("test")),
        score_token_id=score_token_id,
        stop_token_ids=tuple(stop_token_ids),
        data_fingerprint=fingerprint(config.data.train, [config.data.prompt_key, config.data.answer_key]),
        folder=claim_output_folder(config),
    )


def _check_vocabulary(setting: str, ids: tuple[int, ...], vocab_size: int) -> None:
    outside = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if outside:
        raise ConfigError(
            [
                f"{setting}: token id {outside[0]} is not in the model's vocabulary; expected 0 to {vocab_size - 1}"
            ]
        )
