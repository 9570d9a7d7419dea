"""Generation and scoring over a fleet: bounded, retried where that is safe, each with a deadline.

A generation may be repeated: nothing of it counts before its answer has arrived whole, and an answer that comes
after its request was given up is dropped with its connection. So no response is lost and none is counted twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megatron_laser.rollout.client.errors import (
    ServerError,
    ServerFault,
    ServerMismatch,
    ServerRefused,
)
from megatron_laser.rollout.client.event_loop import OneThread, all_or_first_error, cancelling
from megatron_laser.rollout.client.fleet import Fleet, Member
from megatron_laser.rollout.client.responses import RequestStats, Weights, joined
from megatron_laser.rollout.client.router import Router
from megatron_laser.rollout.client.sender import RequestSender
from megatron_laser.rollout.client.slots import Slots
from megatron_laser.rollout.engine import StopEarly
from megatron_laser.rollout.routed_experts import Routed, known_tokens, parse_routing, routing_request
from megatron_laser.rollout.sampled_sets import parse_sets, sets_request
from megatron_laser.rollout.sglang_api import (
    Reply,
    generate_body,
    parse_generate,
    parse_score,
    score_body,
)
from megatron_laser.types import Generation, SamplingParams, TokenSets

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds of one request: a queue in front of it, and every token of it, on a loaded server.
_REQUEST_SECONDS = 120.0
_TOKEN_SECONDS = 0.25
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds at most between two attempts; doubles from one to the other


@dataclass(eq=False)
class _Job:
    """One response that is being sampled. `partial`: what an earlier, aborted request had of it."""

    prompt: int
    sample: int
    prompt_ids: Sequence[int]
    partial: Generation | None
    rid: str = ""
    member: Member | None = None


class Driver:
    """Sends requests to the servers of `fleet`, through `router` where there is one."""

    def __init__(self, fleet: Fleet, *, vocab_size: int, router: Router | None = None) -> None:
        self._fleet = fleet
        self._vocab_size = vocab_size
        self._slots = Slots(fleet)
        self._trouble = ""  # what a request was last repeated for
        self._said_unrouted = False
        self.stats = RequestStats()
        self._sender = RequestSender(fleet, self.stats, router)
        self.busy = self._sender.busy

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        weights: Weights,
        *,
        ends: float,
        on_finished: Callable[[int, int, Generation], None] | None,
        resume: Mapping[tuple[int, int], Generation],
        stop: StopEarly | None,
    ) -> list[list[Generation | None]]:
        """See `SglangEngine.generate`; `ends` by time.monotonic()."""
        if sampling.seed is None:
            # A server with deterministic inference would take the same one for every response.
            sampling = replace(sampling, seed=secrets.randbits(62))
        samples = sampling.samples_per_prompt
        results: list[list[Generation | None]] = [[None] * samples for _ in prompts]
        jobs = []
        for p, ids in enumerate(prompts):
            for s in range(samples):
                known = resume.get((p, s))
                results[p][s] = known
                if known is None or known.finish_reason == "abort":
                    jobs.append(_Job(p, s, ids, known))
        cached_on: dict[int, Member] = {}
        stopped = asyncio.Event()
        finished = OneThread(
            "rollout responses"
        )  # what is done with one, its decoding too, does not hold up the loop

        async def run(job: _Job) -> None:
            async with self._slots:
                if stopped.is_set():
                    return
                generation = await self._generate_one(job, sampling, weights, cached_on, ends, stopped)
            if generation is None:
                return
            results[job.prompt][job.sample] = generation
            if generation.finish_reason != "abort" and on_finished is not None:
                await finished.call(on_finished, job.prompt, job.sample, generation)

        tasks = {asyncio.create_task(run(job)): job for job in jobs}
        if stop is not None:
            loop = asyncio.get_running_loop()
            stop.on_set(lambda: loop.call_soon_threadsafe(stopped.set))
        watcher = asyncio.create_task(self._abort_when(stopped, jobs))
        try:
            await all_or_first_error(tasks, ends, self._late("generation"))
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await finished.end()
        return results

    async def generate_one(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        weights: Weights,
        *,
        ends: float,
        cached_on: dict[int, Member],
    ) -> Generation | None:
        """One response, among other requests; `cached_on`: {0: the server that knows what `ids` begin with}, or {}."""
        async with self._slots:
            job = _Job(0, 0, ids, None)
            return await self._generate_one(job, sampling, weights, cached_on, ends, asyncio.Event())

    async def score_one(
        self,
        ids: Sequence[int],
        token_ids: Sequence[int],
        weights: Weights,
        *,
        ends: float,
        cached_on: Mapping[int, Member],
    ) -> list[float]:
        """Log-probs of tokens at one place; arguments as in `generate_one`."""
        async with self._slots:
            return await self._score_one(ids, token_ids, weights, cached_on.get(0), ends)

    async def score(
        self, sequences: Sequence[Sequence[int]], token_ids: Sequence[int], weights: Weights, *, ends: float
    ) -> list[list[float]]:
        """See `SglangEngine.score_tokens`; `ends` by time.monotonic()."""
        values: list[list[float]] = [[]] * len(sequences)

        async def run(index: int) -> None:
            async with self._slots:
                values[index] = await self._score_one(sequences[index], token_ids, weights, None, ends)

        tasks = {asyncio.create_task(run(i)): i for i in range(len(sequences))}
        await all_or_first_error(tasks, ends, self._late("score"))
        return values

    async def _generate_one(
        self,
        job: _Job,
        sampling: SamplingParams,
        weights: Weights,
        cached_on: dict[int, Member],
        ends: float,
        stopped: asyncio.Event,
    ) -> Generation | None:
        partial = job.partial
        had: list[int] = [] if partial is None else partial.response_ids.tolist()
        left = sampling.max_new_tokens - len(had)
        input_ids = [*job.prompt_ids, *had]

        async def attempt(failed: Member | None) -> Generation | None:
            if stopped.is_set():
                return partial
            job.member = None
            member = await self._fleet.pick("generation", cached_on.get(job.prompt), failed)
            # The samples of a prompt go to one server: its prefix cache has the prompt after the first.
            cached_on[job.prompt] = job.member = member
            job.rid = uuid.uuid4().hex
            place = (job.prompt, job.sample)
            body = generate_body(input_ids, sampling, max_new_tokens=left, rid=job.rid, place=place)
            known = known_tokens(partial)
            body |= routing_request(sampling.routing, known) | sets_request(sampling)
            routed: Routed | None = None
            sets: TokenSets | None = None
            unrouted = False

            def parse(answer: Any) -> Reply:
                nonlocal routed, sets, unrouted
                reply = parse_generate(
                    answer, self._vocab_size, max_new_tokens=left, prompt_tokens=len(input_ids)
                )
                if sampling.top_k is not None:
                    sets, logprobs = parse_sets(answer, reply.ids, self._vocab_size)
                    reply = replace(reply, logprobs=logprobs)
                if sampling.routing is not None:
                    # The last token was not fed.
                    tokens = max(0, len(input_ids) + len(reply.ids) - 1 - known)
                    routed = parse_routing(answer, sampling.routing, tokens=tokens)
                    unrouted = routed is None or len(routed) < tokens
                return reply

            seconds = min(ends - time.monotonic(), _REQUEST_SECONDS + _TOKEN_SECONDS * left)
            started = time.monotonic()
            try:
                reply = await self._sender.ask(
                    member,
                    body,
                    parse,
                    weights=weights,
                    seconds=seconds,
                    phase="generation",
                    # SGLang's router passes on the fields that it knows: the servers would not be asked for experts or
                    # sets.
                    direct=failed is not None or sampling.routing is not None or sampling.top_k is not None,
                )
            finally:
                job.rid = ""
                self.stats.generate_seconds += time.monotonic() - started
            if reply.finish_reason == "abort" and not stopped.is_set():
                raise ServerFault(member.url, "generation", "aborted, but not by this run")
            self.stats.prompt_tokens += reply.prompt_tokens
            self.stats.cached_tokens += reply.cached_tokens
            if unrouted and reply.finish_reason != "abort":
                self._note_unrouted(member)
            return joined(partial, reply, weights.version, sampling, routed, sets)

        generation = await self._retried(attempt, lambda: job.member)
        token = sampling.score_token_id
        if generation is not None and token is not None and generation.is_scored(sampling.stop_token_ids):
            sequence = [*job.prompt_ids, *generation.response_ids.tolist()]
            (value,) = await self._score_one(sequence, (token,), weights, job.member, ends)
            generation.zc_logprob = value
        return generation

    def _note_unrouted(self, member: Member) -> None:
        """A response came without the experts of all its tokens: said once, counted always."""
        self.stats.unrouted += 1
        if not self._said_unrouted:
            self._said_unrouted = True
            logger.warning(
                "%s gives no routed experts for some tokens, which moe.routing_replay asks for: the trainer routes "
                "these by itself; start servers with --enable-return-routed-experts, as `serve` does",
                member.url,
            )

    async def _score_one(
        self,
        sequence: Sequence[int],
        token_ids: Sequence[int],
        weights: Weights,
        preferred: Member | None,
        ends: float,
    ) -> list[float]:
        member: Member | None = None

        async def attempt(failed: Member | None) -> list[float]:
            nonlocal member
            member = await self._fleet.pick("score", preferred, failed)
            body = score_body(sequence, *token_ids, rid=uuid.uuid4().hex)
            started = time.monotonic()
            try:
                reply = await self._sender.ask(
                    member,
                    body,
                    lambda answer: parse_score(answer, *token_ids, prompt_tokens=len(sequence)),
                    weights=weights,
                    # Behind a full queue it waits as long as that takes: another server would have to read the whole
                    # sequence again. One that hangs is found by its probes.
                    seconds=ends - started,
                    phase="score",
                    direct=failed is not None,
                    patient=True,
                )
            finally:
                self.stats.score_seconds += time.monotonic() - started
            self.stats.scores += 1
            self.stats.score_tokens += reply.prompt_tokens
            self.stats.score_cached_tokens += reply.cached_tokens
            return list(reply.logprobs)

        return await self._retried(attempt, lambda: member)

    async def _retried(
        self,
        attempt: Callable[[Member | None], Awaitable[Any]],
        last: Callable[[], Member | None],
    ) -> Any:
        """`attempt` until it succeeds; it is told the server that it failed on, which `last` names."""
        failed: Member | None = None

        def note(error: ServerError) -> None:
            nonlocal failed
            failed = last()
            self.stats.retries += 1
            self._trouble = str(error)

        return await retried(lambda: attempt(failed), note)

    def _late(self, phase: str) -> Callable[[int, int], str]:
        """What to say when time is up."""
        self._trouble = ""

        def message(waiting: int, all_of_them: int) -> str:
            trouble = f"the last failed try: {self._trouble}; " if self._trouble else ""
            return (
                f"{phase}: {waiting} of {all_of_them} requests were not done in time; "
                f"{trouble}{self._fleet.describe()}"
            )

        return message

    async def _abort_when(self, stopped: asyncio.Event, jobs: Sequence[_Job]) -> None:
        """Once `stopped` is set, ask the servers again and again to end what is open."""
        await stopped.wait()
        while True:
            held = [(job.member, job.rid) for job in jobs if job.rid and job.member is not None]
            await asyncio.gather(*(self._sender.abort(member, rid) for member, rid in held))
            await asyncio.sleep(0.5)


async def retried(attempt: Callable[[], Awaitable[T]], note: Callable[[ServerError], None]) -> T:
    """`attempt` until it succeeds, with jitter between; what would only repeat itself ends it.

    Whoever waits for it cancels it at the end of time; a request whose own time is up just then ends with that error
    instead, and is not repeated either. `note` is called with the error before each further attempt.
    """
    longest = _FIRST_PAUSE
    while True:
        try:
            return await attempt()
        except ServerError as error:
            if isinstance(error, ServerRefused | ServerMismatch) or cancelling():
                raise
            note(error)
        await asyncio.sleep(random.uniform(0.0, longest))
        longest = min(2 * longest, _LONGEST_PAUSE)
