"""Generation that ends a response as soon as the score of its prefix falls below a threshold.

A response is generated in stretches from one place of a `PrefixRule` to the next, each behind the token ids that are
there, so that what is sampled has the distribution of a response in one piece. Responses run side by side: to servers
as requests of their own, in this process gathered into batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_laser.evaluation.prefix_rule import PrefixRule
from megatron_laser.evaluation.score_rule import joined
from megatron_laser.rollout.client.event_loop import all_or_first_error
from megatron_laser.rollout.engine import RolloutEngine, StopEarly, StoppedEarly
from megatron_laser.rollout.function.engine_requests import Requests, requests_to
from megatron_laser.rollout.token_scores import ScoresByEngine
from megatron_laser.types import Generation, SamplingParams

_STOP_SECONDS = 20.0  # for what is under way, once it is told to end


class EndingEngine(ScoresByEngine):
    """The part of an engine that an evaluation needs, with responses that end early."""

    def __init__(
        self, engine: RolloutEngine, prefixes: PrefixRule, *, threshold: float, max_positions: int
    ) -> None:
        """
        Args:
            threshold: a prefix with a lower score ends its response (`finish_reason` "ended").
            max_positions: tokens that the model can read.
        """
        super().__init__(engine)
        self._engine = engine
        self._prefixes = prefixes
        self._threshold = threshold
        self._max_positions = max_positions

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Callable[[int, int, Generation], None] | None = None,
        stop: StopEarly | None = None,
    ) -> list[list[Generation]]:
        """See `RolloutEngine.generate`; what was read of prefixes comes along, no log-prob of the score token."""
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(62))
        ends = time.monotonic() + deadline
        return asyncio.run(self._generate(prompts, sampling, ends, on_finished, stop))

    async def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        ends: float,
        on_finished: Callable[[int, int, Generation], None] | None,
        stop: StopEarly | None,
    ) -> list[list[Generation]]:
        loop = asyncio.get_running_loop()
        requests = requests_to(self._engine, sampling, ends=ends, max_positions=self._max_positions)
        places = [(p, s) for p in range(len(prompts)) for s in range(sampling.samples_per_prompt)]
        found: dict[tuple[int, int], Generation] = {}
        requests.begun(len(places))

        async def one(place: tuple[int, int]) -> None:
            try:
                found[place] = await self._response(list(prompts[place[0]]), sampling, requests, place)
            finally:
                requests.ended()
            if on_finished is not None:
                on_finished(*place, found[place])

        def late(waiting: int, all_of_them: int) -> str:
            return f"generation: {waiting} of {all_of_them} responses were not done in time"

        tasks = {asyncio.create_task(one(place)): place for place in places}
        work = asyncio.create_task(all_or_first_error(tasks, ends, late))
        halt = asyncio.Event()

        def stopped() -> None:
            with contextlib.suppress(RuntimeError):  # the loop of a call that has ended
                loop.call_soon_threadsafe(halt.set)

        if stop is not None:
            stop.on_set(stopped)
        halted = asyncio.create_task(halt.wait())
        try:
            await asyncio.wait({work, halted}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise StoppedEarly(f"stopped with {len(found)} of {len(places)} responses done")
            work.result()
        finally:
            halted.cancel()
            work.cancel()
            await asyncio.wait({work, halted}, timeout=_STOP_SECONDS)
            await requests.close()
        samples = range(sampling.samples_per_prompt)
        return [[found[p, s] for s in samples] for p in range(len(prompts))]

    async def _response(
        self, prompt_ids: list[int], sampling: SamplingParams, requests: Requests, place: tuple[int, int]
    ) -> Generation:
        ids: list[int] = []
        logprobs: list[float] = []
        reads: list[float] = []
        asked = 0
        while True:
            tokens, pauses = self._prefixes.stretch(len(ids), sampling.max_new_tokens - len(ids))
            stretch = replace(
                sampling,
                samples_per_prompt=1,
                max_new_tokens=tokens,
                stop_token_ids=tuple(dict.fromkeys((*sampling.stop_token_ids, *pauses))),
                score_token_id=None,
            )
            more = await requests.generate([*prompt_ids, *ids], stretch, (*place, asked))
            asked += 1
            ids += more.response_ids.tolist()
            logprobs += more.logprobs.tolist()
            reason = more.finish_reason
            # A whole response ends here, too: at an end token, be it one that the server alone knows, or where the
            # server has no more room.
            if reason == "stop" and (ids[-1] in sampling.stop_token_ids or ids[-1] not in pauses):
                break
            if reason == "length" and len(more.response_ids) < tokens:
                break
            if len(ids) >= sampling.max_new_tokens:
                reason = "length"
                break
            if not self._prefixes.is_place(ids):
                continue
            reads.append(await self._read([*prompt_ids, *ids], requests, (*place, asked)))
            score = self._prefixes.rule.score(reads[-1])
            if score is not None and score < self._threshold:
                reason = "ended"
                break
        return Generation(
            np.array(ids, dtype=np.int32),
            np.array(logprobs, dtype=np.float32),
            reason,
            more.weight_version,
            prefix_reads=tuple(reads),
        )

    async def _read(self, ids: list[int], requests: Requests, place: tuple[int, int, int]) -> float:
        """As `ScoreRule.read`, of one sequence."""
        values = await requests.score(ids, self._prefixes.rule.token_ids, place)
        return joined([[value] for value in values])[0]
