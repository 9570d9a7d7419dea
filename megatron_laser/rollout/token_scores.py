"""Log-probs of several tokens at the same places, in as few passes of an engine as it can."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class Scores(Protocol):
    """The part of `RolloutEngine` that is needed."""

    def score(self, sequences: Sequence[Sequence[int]], token_id: int, *, deadline: float) -> list[float]:
        """See `RolloutEngine.score`."""
        ...


@runtime_checkable
class ScoresTokens(Protocol):
    """An engine that reads several tokens of one distribution at once, as both of this package do."""

    def score_tokens(
        self, sequences: Sequence[Sequence[int]], token_ids: Sequence[int], *, deadline: float
    ) -> list[list[float]]:
        """log pi(token | sequence) at temperature 1, [sequences][tokens]."""
        ...


class ScoresByEngine:
    """What generates otherwise than its engine does, and scores as that does."""

    def __init__(self, engine: Scores) -> None:
        self._scores = engine

    def score(self, sequences: Sequence[Sequence[int]], token_id: int, *, deadline: float) -> list[float]:
        """See `RolloutEngine.score`."""
        return self._scores.score(sequences, token_id, deadline=deadline)

    def score_tokens(
        self, sequences: Sequence[Sequence[int]], token_ids: Sequence[int], *, deadline: float
    ) -> list[list[float]]:
        """See `ScoresTokens`."""
        return token_scores(self._scores, sequences, token_ids, deadline=deadline)


def token_scores(
    engine: Scores, sequences: Sequence[Sequence[int]], token_ids: Sequence[int], *, deadline: float
) -> list[list[float]]:
    """log pi(token | sequence) at temperature 1, [sequences][tokens], for prompt + response ids.

    One pass where `engine` is one of `ScoresTokens`, else one call of its `score` for each token.

    Args:
        deadline: seconds for all of it.

    Raises:
        TimeoutError: it passed.
    """
    if len(token_ids) > 1 and isinstance(engine, ScoresTokens):
        return engine.score_tokens(sequences, token_ids, deadline=deadline)
    ends = time.monotonic() + deadline
    columns = []
    for token_id in token_ids:
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"scoring took more than {deadline:g} s")
        columns.append(engine.score(sequences, token_id, deadline=left))
    return [list(row) for row in zip(*columns, strict=True)]
