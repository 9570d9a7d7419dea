"""`megatron-laser calibrate`: a score token for a base model, and the constants of its score."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_laser.config.model_folder.spare_tokens import SpareToken, how_to_add_a_token, spare_tokens
from megatron_laser.config.model_folder.special_tokens import resolve_score_token
from megatron_laser.data import NO_OPTIONS, ChatOptions, Row, build_prompts, read_rows
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.engine_choice import EngineChoice
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.evaluation.pinned_weights import PinnedWeights
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.rollout.token_scores import token_scores
from megatron_laser.testtime.calibration_result import Calibration, TokenStatistics
from megatron_laser.types import Prompt, SamplingParams

logger = logging.getLogger(__name__)

_BATCH = 1000  # texts for one call of the tokenizer
FEWEST_RESPONSES = 20
"""Finished responses below which no constant is given."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """See the options of `megatron-laser calibrate`."""

    tokens: tuple[str, ...] = ()
    candidates: int = 8
    problems: int = 150
    samples: int = 2
    max_new_tokens: int = 8192
    max_std: float = 1.0
    beta: float = 0.1
    prompt_key: str = "problem"
    answer_key: str = "answer"
    prompt_suffix: str = " Please reason step by step, and put your final answer within \\boxed{}."
    apply_chat_template: bool = True
    options: ChatOptions = NO_OPTIONS
    seed: int = 1
    deadline: float = 3600.0


def calibrate_model(
    model: ModelFolder,
    data: Path,
    choice: EngineChoice,
    settings: CalibrationSettings,
    *,
    say: Callable[[str], None] = logger.info,
    engine: RolloutEngine | None = None,
) -> Calibration:
    """Propose tokens, sample responses, measure each token behind them, and choose one.

    Args:
        engine: to use in place of one made of `choice`; it stays open.

    Raises:
        TestTimeError: no token is spare (the message shows how to add one), a named token does not fit, or too few
            responses ended by themselves.
        DataError: the data file does not fit.
        WeightsChanged: the weights were changed meanwhile.
    """
    rows = read_rows(data, prompt_key=settings.prompt_key, answer_key=settings.answer_key, mathematics=False)
    proposed = _named(model, settings.tokens) if settings.tokens else _proposed(model)
    prompts = _all_prompts(model, rows, settings)
    unused, in_data = _not_in_data(model, proposed, rows, prompts)
    for token in in_data:
        say(f"{token.name}: occurs in the data, left out")
    if not unused:
        raise TestTimeError(
            f"{model.path}: every spare token occurs in {data}. {how_to_add_a_token(model.path)}"
        )
    unused = unused if settings.tokens else unused[: settings.candidates]
    say(f"candidates: {', '.join(token.name for token in unused)}")
    picked = random.Random(settings.seed).sample(prompts, min(settings.problems, len(prompts)))
    _check_length(model, picked, settings)
    with PinnedWeights(choice, model, deadline=settings.deadline, engine=engine) as weights:
        result = _measure(weights.engine(), model, picked, unused, settings, say)
        weights.check()
        return replace(result, weights=weights.identity)


def _measure(
    engine: RolloutEngine,
    model: ModelFolder,
    prompts: list[Prompt],
    candidates: Sequence[SpareToken],
    settings: CalibrationSettings,
    say: Callable[[str], None],
) -> Calibration:
    say(f"sampling {settings.samples} responses to each of {len(prompts)} problems")
    groups = engine.generate(
        [prompt.token_ids for prompt in prompts],
        SamplingParams(
            samples_per_prompt=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            stop_token_ids=model.stop_token_ids,
            seed=settings.seed,
        ),
        deadline=settings.deadline,
    )
    generated = {token_id for group in groups for one in group for token_id in one.response_ids.tolist()}
    sequences: list[list[int]] = []
    ends: list[int] = []
    for prompt, group in zip(prompts, groups, strict=True):
        for generation in group:
            if generation.is_scored(model.stop_token_ids):
                sequences.append([*prompt.token_ids, *generation.response_ids.tolist()])
                ends.append(int(generation.response_ids[-1]))
    total = len(prompts) * settings.samples
    say(f"{len(sequences)} of {total} responses ended by themselves")
    if len(sequences) < FEWEST_RESPONSES:
        raise TestTimeError(
            f"only {len(sequences)} of {total} responses ended in a stop token ({list(model.stop_token_ids)}) within "
            f"{settings.max_new_tokens} tokens; expected {FEWEST_RESPONSES} or more: raise --problems, --samples or "
            "--max-new-tokens, or check the stop tokens and whether the chat template fits the model"
        )
    unseen = [token.id for token in candidates if token.id not in generated]
    rows = token_scores(engine, sequences, unseen, deadline=settings.deadline)
    read = dict(zip(unseen, zip(*rows, strict=True), strict=True)) if unseen else {}
    statistics = []
    for token in candidates:
        if token.id in generated:
            statistics.append(TokenStatistics.generated(token))
            continue
        values = read[token.id]
        if not all(math.isfinite(value) for value in values):
            raise TestTimeError(
                f"{token.name}: the engine returned a log-prob that is not finite: check the weights"
            )
        statistics.append(TokenStatistics.of(token, values, ends, max_std=settings.max_std))
    return Calibration(
        model=str(model.path),
        responses=len(sequences),
        sampled=total,
        beta=settings.beta,
        max_std=settings.max_std,
        tokens=statistics,
    )


def _proposed(model: ModelFolder) -> list[SpareToken]:
    tokens = spare_tokens(model.path, vocab_size=model.vocab_size, stop_token_ids=model.stop_token_ids)
    if not tokens:
        raise TestTimeError(
            f"{model.path}: the tokenizer has no spare token: every special token ends or structures text, and the "
            f"model's {model.vocab_size} rows all belong to tokens. {how_to_add_a_token(model.path)}"
        )
    return tokens


def _named(model: ModelFolder, names: Sequence[str]) -> list[SpareToken]:
    tokens = []
    for name in names:
        wanted = int(name) if name.isdigit() else name
        found = resolve_score_token(model.path, wanted, setting="--token")
        if found.id is None or not 0 <= found.id < model.vocab_size:
            raise TestTimeError(f"--token {name}: not among the model's ids 0 to {model.vocab_size - 1}")
        if found.id in model.stop_token_ids:
            raise TestTimeError(f"--token {name}: it ends responses; expected an unused token")
        tokens.append(SpareToken(found.id, found.text, "named"))
    return tokens


def _all_prompts(model: ModelFolder, rows: list[Row], settings: CalibrationSettings) -> list[Prompt]:
    if settings.apply_chat_template and not getattr(model.tokenizer, "chat_template", None):
        raise TestTimeError("the tokenizer has no chat template; use --no-chat-template (a base model)")
    return build_prompts(
        rows,
        model.tokenizer,
        prompt_suffix=settings.prompt_suffix,
        apply_chat_template=settings.apply_chat_template,
        options=settings.options,
        max_prompt_tokens=model.max_positions - 1,
        vocab_size=model.vocab_size,
    )[0]


def _not_in_data(
    model: ModelFolder, tokens: Sequence[SpareToken], rows: Sequence[Row], prompts: Sequence[Prompt]
) -> tuple[list[SpareToken], list[SpareToken]]:
    """(tokens that no prompt and no answer holds, the others)."""
    used = {token_id for prompt in prompts for token_id in prompt.token_ids}
    for start in range(0, len(rows), _BATCH):
        answers = [row.answer for row in rows[start : start + _BATCH]]
        for ids in model.tokenizer(answers, add_special_tokens=False)["input_ids"]:
            used.update(ids)
    return [t for t in tokens if t.id not in used], [t for t in tokens if t.id in used]


def _check_length(model: ModelFolder, prompts: Sequence[Prompt], settings: CalibrationSettings) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest + settings.max_new_tokens + 1 > model.max_positions:
        raise TestTimeError(
            f"the longest prompt {longest} + --max-new-tokens {settings.max_new_tokens} + 1 is more than the model's "
            f"max_position_embeddings {model.max_positions}; expected --max-new-tokens "
            f"{max(1, model.max_positions - longest - 1)} or less"
        )
