"""The engine as a user's function sees it: token ids in and out, within the budget of one sample."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from megatron_laser.rollout.function.conversation import InvalidSample, Turn, check_ids
from megatron_laser.rollout.function.engine_requests import Requests
from megatron_laser.types import Prompt, SamplingParams

T = TypeVar("T")


class FunctionEngine:
    """What `generate(engine, prompt, sampling)` is given; of one sample, in one event loop.

    Attributes:
        vocab_size: ids are from 0 to one less.
        stop_token_ids: what ends a response (`rollout.stop_token_ids`).
        score_token_id: the token of `score`; None without LaSeR.
    """

    def __init__(
        self,
        requests: Requests,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        place: tuple[int, int],
        tokenizer: Any,
        vocab_size: int,
        longest: int,
        score_token_id: int | None,
        ends: float,
        fail: Callable[[Exception], None],
    ) -> None:
        """
        Args:
            place: (prompt, sample).
            longest: tokens of any sequence that the engine is made for.
            ends: by time.monotonic().
            fail: told what the engine raises: no fault of the function's, and the end of the rollout.
        """
        self.vocab_size = vocab_size
        self.stop_token_ids = sampling.stop_token_ids
        self.score_token_id = score_token_id
        self._requests = requests
        self._prompt_ids = list(prompt.token_ids)
        self._sampling = sampling
        self._place = place
        self._tokenizer = tokenizer
        self._longest = longest
        self._ends = ends
        self._fail = fail
        self._asked = 0
        self._closed = False

    async def generate(
        self, ids: Sequence[int], *, max_new_tokens: int | None = None, stop_token_ids: Sequence[int] = ()
    ) -> Turn:
        """Have the policy go on behind `ids`, at the run's temperature.

        Args:
            ids: prompt and response so far (`Conversation.ids`), or any other text for the policy.
            max_new_tokens: of this turn; at most what is left, which is the default.
            stop_token_ids: these end the turn, besides the run's own `stop_token_ids`.

        Raises:
            InvalidSample: an id outside the vocabulary, or no room for a token more.
        """
        ids = self._checked(ids)
        left = self._room(ids, self.tokens_left(ids))
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InvalidSample(f"engine.generate: max_new_tokens={max_new_tokens}; expected 1 or more")
        more = check_ids(stop_token_ids, self.vocab_size, "engine.generate: stop_token_ids")
        wanted = left if max_new_tokens is None else min(max_new_tokens, left)
        stops = dict.fromkeys((*self.stop_token_ids, *more))
        sampling = replace(
            self._sampling,
            samples_per_prompt=1,
            max_new_tokens=wanted,
            stop_token_ids=tuple(stops),
            score_token_id=None,
            routing=None,
        )
        found = await self._ask(self._requests.generate(ids, sampling, self._next()))
        return Turn(
            tuple(ids),
            tuple(found.response_ids.tolist()),
            found.logprobs,
            found.finish_reason,
            found.weight_version,
        )

    async def score(self, ids: Sequence[int]) -> float:
        """log pi(score token | ids) at temperature 1, in nats: the self-reward's input, behind an ended response.

        Raises InvalidSample without LaSeR, or as `generate` does.
        """
        if self.score_token_id is None:
            raise InvalidSample("engine.score: the run has no score token; set laser.enabled: true")
        ids = self._checked(ids)
        self._room(ids, self._longest + 1 - len(ids))
        (value,) = await self._ask(self._requests.score(ids, (self.score_token_id,), self._next()))
        return value

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def tokens_left(self, ids: Sequence[int]) -> int:
        """How many tokens may follow `ids`: of `rollout.max_new_tokens` behind the prompt, else of the longest sequence
        that the run allows."""
        begun = len(self._prompt_ids)
        if list(ids[:begun]) == self._prompt_ids:
            return self._sampling.max_new_tokens - (len(ids) - begun)
        return self._longest - len(ids)

    @property
    def seconds_left(self) -> float:
        """Until the sample is given up (`rollout.function_deadline`)."""
        return max(0.0, self._ends - time.monotonic())

    def close(self) -> None:
        """The sample has ended, or was given up: nothing is asked for any more."""
        self._closed = True

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if self._closed:
            raise InvalidSample("the sample has ended: its engine can be asked for nothing any more")
        if not len(ids):
            raise InvalidSample("no token ids: expected at least one")
        return check_ids(ids, self.vocab_size, "ids")

    def _room(self, ids: list[int], left: int) -> int:
        if left < 1:
            raise InvalidSample(
                f"there is no room behind {len(ids)} ids: the response has rollout.max_new_tokens "
                f"{self._sampling.max_new_tokens}; look at engine.tokens_left(ids) before"
            )
        return left

    def _next(self) -> tuple[int, int, int]:
        self._asked += 1
        return (*self._place, self._asked)

    async def _ask(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._fail(error)
            raise
