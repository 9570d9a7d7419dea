"""Steps in which no response ended by itself: said with the likely cause, and not gone on with for ever.

Such a response is cut at the length limit. It has no score, so LaSeR trains nothing of it, while everything else looks
as if the run went well.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_laser.config import RunConfig
from megatron_laser.errors import UserError
from megatron_laser.types import Generation, Group

logger = logging.getLogger(__name__)


class NothingEnds(UserError, RuntimeError):
    """No response has ended by itself for too many steps of a run that needs scores."""


class Endings:
    """Counts steps in a row in which no response ended by itself."""

    def __init__(
        self,
        stop_token_ids: Collection[int],
        *,
        max_new_tokens: int,
        steps: int,
        limit: int | None = None,
        special: Mapping[int, str] | None = None,
    ) -> None:
        """
        Args:
            stop_token_ids: what ends a response.
            steps: of the run: it does not end without a single score either, however short it is.
            limit: so many steps in a row are too many; None: nothing needs scores, or the user wants it so.
            special: the tokenizer's special tokens by id: one that stands in the responses is a likely end.
        """
        self._stops = tuple(stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self._steps = steps
        self._limit = limit
        self._special = special or {}
        self._said = False
        self.in_a_row = 0

    def note(self, step: int, groups: Sequence[Group]) -> None:
        """Look at everything that was sampled for `step` (from 1), once.

        Raises:
            NothingEnds: `limit` steps in a row, or all `steps` of the run, had no response that ended by itself.
        """
        samples = [sample for group in groups for sample in (*group.samples, *group.ungraded)]
        if not samples or any(sample.scored for sample in samples):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        found = self._found([sample.generation for sample in samples])
        if self._limit is not None:
            whole = self.in_a_row == step == self._steps
            if whole or self.in_a_row >= self._limit:
                count = f"{self.in_a_row} {'step' if self.in_a_row == 1 else 'steps'}"
                which = (
                    f"in all {count} of the run"
                    if whole
                    else f"in {count} in a row (laser.max_unscored_steps)"
                )
                raise NothingEnds(
                    f"{which} no response ended by itself, so that none has a score and the self-reward learned "
                    f"nothing; in the last one {found}. Or go on all the same: laser.max_unscored_steps: null"
                )
        if not self._said:
            self._said = True
            logger.warning(
                "step %d: no response ended by itself, so none has a score: %s (said once)", step, found
            )

    def _found(self, generations: Sequence[Generation]) -> str:
        """What the responses look like, and what to do."""
        count = len(generations)
        longest = sum(len(generation.response_ids) >= self._max_new_tokens for generation in generations)
        ids = ", ".join(self._name(token) for token in self._stops)
        text = f"{longest} of {count} were cut at rollout.max_new_tokens {self._max_new_tokens}; they end at {ids}"
        others = Counter(
            token
            for generation in generations
            for token in np.unique(generation.response_ids).tolist()
            if token in self._special and token not in self._stops
        )
        token, places = others.most_common(1)[0] if others else (0, 0)
        if 2 * places >= count:  # one that stands in a few is sampled by chance
            return (
                f"{text}, and {places} of them have {self._name(token)} in them, which is likely what the policy ends "
                f"with: set rollout.stop_token_ids: {[*self._stops, token]}"
            )
        return (
            f"{text}. Raise rollout.max_new_tokens, or name what the policy really ends with in rollout.stop_token_ids "
            "(the texts are in rollouts/ with logging.rollouts_every)"
        )

    def _name(self, token: int) -> str:
        return f"{token} ({self._special[token]})" if token in self._special else str(token)


def watch_endings(config: RunConfig, stop_token_ids: Collection[int], tokenizer: Any) -> Endings:
    """What a run watches: with LaSeR it stops after `laser.max_unscored_steps`, without it is only said."""
    laser = config.laser
    special = {int(i): str(tokenizer.convert_ids_to_tokens(int(i))) for i in tokenizer.all_special_ids}
    return Endings(
        stop_token_ids,
        max_new_tokens=config.rollout.max_new_tokens,
        steps=config.run.steps,
        limit=laser.max_unscored_steps if laser.enabled else None,
        special=special,
    )
