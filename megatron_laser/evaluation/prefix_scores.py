"""Scores of the prefixes of responses that are there, asked of an engine in pieces of bounded size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_laser.evaluation.prefix_rule import PrefixRule
from megatron_laser.evaluation.responses import EvaluationEngine, SavedResponse
from megatron_laser.types import Prompt

# A response of n tokens has sequences of about n^2 / (2 * every) tokens, which are lists of Python's.
_TOKENS_PER_CALL = 2_000_000


@dataclass(slots=True)
class PrefixScores:
    """Of one response: after how many tokens, increasing, and the scores there."""

    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def score_prefixes(
    engine: EvaluationEngine,
    rule: PrefixRule,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[SavedResponse]],
    *,
    deadline: float,
) -> list[list[PrefixScores]]:
    """The scores of every response's prefixes, as `groups`; the engine is asked for what did not come with responses.

    Args:
        deadline: seconds for all of it.

    Raises:
        TimeoutError: it passed.
        RuntimeError: the engine returned a log-prob that is not finite.
    """
    ends = time.monotonic() + deadline
    found = [[PrefixScores() for _ in group] for group in groups]

    def note(i: int, j: int, tokens: int, value: float) -> None:
        score = rule.rule.score(value) if math.isfinite(value) else None
        if score is None:
            raise RuntimeError(
                f"the engine returned log-prob {value} behind {tokens} tokens of a response to row {prompts[i].row}; "
                "expected a finite number: check the weights"
            )
        found[i][j].tokens.append(tokens)
        found[i][j].scores.append(score)

    for i, group in enumerate(groups):
        for j, response in enumerate(group):
            if response.prefix_reads is not None:
                for tokens, value in zip(_places(rule, response), response.prefix_reads, strict=True):
                    note(i, j, tokens, value)
    for piece in _pieces(rule, prompts, groups):
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"scoring prefixes took more than {deadline:g} s")
        sequences = [prompts[i].token_ids + groups[i][j].response_ids[:tokens] for i, j, tokens in piece]
        values = rule.rule.read(engine, sequences, deadline=left)
        for place, value in zip(piece, values, strict=True):
            note(*place, value)
    return found


def _places(rule: PrefixRule, response: SavedResponse) -> list[int]:
    """Those of the rule; of one that was ended also behind its last token, where more would have followed."""
    places = rule.places(response.response_ids)
    return [*places, len(response.response_ids)] if response.was_ended else places


def _pieces(
    rule: PrefixRule, prompts: Sequence[Prompt], groups: Sequence[Sequence[SavedResponse]]
) -> Iterator[list[tuple[int, int, int]]]:
    """(prompt, response, tokens) of every prefix that was not read, in order, in pieces of about so many tokens."""
    piece: list[tuple[int, int, int]] = []
    size = 0
    for i, group in enumerate(groups):
        for j, response in enumerate(group):
            if response.prefix_reads is not None:
                continue
            for tokens in _places(rule, response):
                piece.append((i, j, tokens))
                size += len(prompts[i].token_ids) + tokens
                if size >= _TOKENS_PER_CALL:
                    yield piece
                    piece, size = [], 0
    if piece:
        yield piece
