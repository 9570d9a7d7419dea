"""Generation and scoring over a fleet: bounded, retried where that is safe, each with a deadline.

A generation may be repeated: nothing of it counts before its answer has arrived whole, and an answer that comes
after its request was given up is dropped with its connection. So no response is lost and none is counted twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_laser.rollout.engine import StopEarly
from megatron_laser.rollout.sglang.client import ServerClient, is_busy
from megatron_laser.rollout.sglang.errors import (
    ServerError,
    ServerFault,
    ServerGone,
    ServerRefused,
    StaleServer,
)
from megatron_laser.rollout.sglang.fleet import Fleet, Member
from megatron_laser.rollout.sglang.health import Answered
from megatron_laser.rollout.sglang.tasks import all_or_first_error, cancelling, retried
from megatron_laser.rollout.sglang.traffic import Traffic, Weights
from megatron_laser.rollout.sglang.wire import (
    WireError,
    abort_message,
    generate_body,
    joined,
    parse_generate,
    parse_score,
    score_body,
)
from megatron_laser.types import Generation, SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds of one request: a queue in front of it, and every token of it, on a loaded server.
_REQUEST_SECONDS = 120.0
_TOKEN_SECONDS = 0.25
_ABORT_SECONDS = 30.0
_ROUTER_REST = 30.0  # seconds without a router after it failed


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

    def __init__(
        self, fleet: Fleet, *, vocab_size: int, max_concurrency: int, router: ServerClient | None = None
    ) -> None:
        self._fleet = fleet
        self._vocab_size = vocab_size
        self._slots = asyncio.Semaphore(max_concurrency)
        self._router = router
        self._router_rests_until = 0.0
        self.traffic = Traffic()

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
        samples = sampling.samples_per_prompt
        results: list[list[Generation | None]] = [[None] * samples for _ in prompts]
        jobs = []
        for p, ids in enumerate(prompts):
            for s in range(samples):
                known = resume.get((p, s))
                if known is not None and known.finish_reason != "abort":
                    results[p][s] = known
                else:
                    results[p][s] = known
                    jobs.append(_Job(p, s, ids, known))
        homes: dict[int, Member] = {}
        stopped = asyncio.Event()

        async def run(job: _Job) -> None:
            async with self._slots:
                if stopped.is_set():
                    return
                generation = await self._generate_one(job, sampling, weights, homes, ends, stopped)
            if generation is None:
                return
            results[job.prompt][job.sample] = generation
            if generation.finish_reason != "abort" and on_finished is not None:
                on_finished(job.prompt, job.sample, generation)

        tasks = {asyncio.create_task(run(job)): job for job in jobs}
        if stop is not None:
            loop = asyncio.get_running_loop()
            stop.on_set(lambda: loop.call_soon_threadsafe(stopped.set))
        watcher = asyncio.create_task(self._abort_when(stopped, jobs))
        try:
            await all_or_first_error(tasks, ends)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        return results

    async def score(
        self, sequences: Sequence[Sequence[int]], token_id: int, weights: Weights, *, ends: float
    ) -> list[float]:
        """See `SglangEngine.score`; `ends` by time.monotonic()."""
        values = [0.0] * len(sequences)

        async def run(index: int) -> None:
            async with self._slots:
                values[index] = await self._score_one(sequences[index], token_id, weights, None, ends)

        await all_or_first_error({asyncio.create_task(run(i)): i for i in range(len(sequences))}, ends)
        return values

    async def _generate_one(
        self,
        job: _Job,
        sampling: SamplingParams,
        weights: Weights,
        homes: dict[int, Member],
        ends: float,
        stopped: asyncio.Event,
    ) -> Generation | None:
        partial = job.partial
        had = [] if partial is None else partial.response_ids
        left = sampling.max_new_tokens - len(had)
        input_ids = [*job.prompt_ids, *had]

        async def attempt() -> Generation | None:
            if stopped.is_set():
                return partial
            member = await self._fleet.pick(homes.get(job.prompt))
            # The samples of a prompt go to one server: its prefix cache has the prompt after the first.
            homes[job.prompt] = job.member = member
            job.rid = uuid.uuid4().hex
            body = generate_body(input_ids, sampling, max_new_tokens=left, rid=job.rid)
            seconds = min(ends - time.monotonic(), _REQUEST_SECONDS + _TOKEN_SECONDS * left)
            started = time.monotonic()
            try:
                answer = await self._send(member, body, seconds, "generation")
            finally:
                job.rid = ""
            self.traffic.generate_seconds += time.monotonic() - started
            refused = abort_message(answer)
            if refused is not None:
                raise ServerRefused(member.url, "generation", refused)
            reply = self._parse(member, "generation", lambda: parse_generate(answer, self._vocab_size))
            self._check_weights(member, "generation", weights, (*reply.versions, reply.version))
            if reply.finish_reason == "abort" and not stopped.is_set():
                raise ServerFault(member.url, "generation", "aborted, but not by this run")
            self.traffic.prompt_tokens += reply.prompt_tokens
            self.traffic.cached_tokens += reply.cached_tokens
            return joined(partial, reply, weights.version, sampling)

        generation = await self._retried(attempt, ends)
        token = sampling.score_token_id
        if generation is not None and token is not None and generation.is_scored(sampling.stop_token_ids):
            sequence = [*job.prompt_ids, *generation.response_ids]
            generation.zc_logprob = await self._score_one(sequence, token, weights, job.member, ends)
        return generation

    async def _score_one(
        self,
        sequence: Sequence[int],
        token_id: int,
        weights: Weights,
        preferred: Member | None,
        ends: float,
    ) -> float:
        async def attempt() -> float:
            member = await self._fleet.pick(preferred)
            body = score_body(sequence, token_id, rid=uuid.uuid4().hex)
            started = time.monotonic()
            answer = await self._send(member, body, min(ends - started, _REQUEST_SECONDS), "score")
            self.traffic.score_seconds += time.monotonic() - started
            refused = abort_message(answer)
            if refused is not None:
                raise ServerRefused(member.url, "score", refused)
            reply = self._parse(member, "score", lambda: parse_score(answer, token_id))
            self._check_weights(member, "score", weights, (reply.version,))
            self.traffic.scores += 1
            self.traffic.score_tokens += reply.prompt_tokens
            self.traffic.score_cached_tokens += reply.cached_tokens
            return reply.logprob

        return await self._retried(attempt, ends)

    async def _send(self, member: Member, body: dict[str, Any], seconds: float, phase: str) -> Any:
        """POST /generate to the router if there is one, else to `member`; ends when the member dies."""
        self.traffic.requests += 1
        router = self._router
        if router is not None and time.monotonic() >= self._router_rests_until:
            try:
                return await router.request(body, deadline=seconds, phase=f"{phase} through the router")
            except ServerGone as error:
                logger.warning("%s; requests go to the servers for %g s", error, _ROUTER_REST)
                self._router_rests_until = time.monotonic() + _ROUTER_REST
                raise
        task = asyncio.ensure_future(member.client.request(body, deadline=seconds, phase=phase))
        member.running.add(task)
        try:
            answer = await task
        except asyncio.CancelledError:
            if task.cancelled() and not cancelling():
                raise ServerGone(
                    member.url, phase, member.health.reason or "it is no longer in use"
                ) from None
            task.cancel()
            await self._abort(member.client, body["rid"])
            raise
        except ServerError as error:
            if not isinstance(error, ServerRefused) and not is_busy(error):
                self._fleet.failed(member, error)
            if not error.gone:
                await self._abort(member.client, body["rid"])
            raise
        finally:
            member.running.discard(task)
        self._fleet.succeeded(member)
        return answer

    def _parse(self, member: Member, phase: str, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except (WireError, LookupError, TypeError) as error:
            fault = ServerFault(member.url, phase, f"its answer has {error}")
            self._fleet.failed(member, fault)
            raise fault from error

    def _check_weights(self, member: Member, phase: str, weights: Weights, versions: tuple[str, ...]) -> None:
        wrong = [version for version in versions if weights.label is not None and version != weights.label]
        if not wrong:
            return
        self.traffic.stale_replies += 1
        if self._router is None:
            self._fleet.tell(member, Answered(wrong[0]))
        raise StaleServer(
            member.url, phase, f"answered with weights {wrong[0]!r} instead of {weights.label!r}; dropped"
        )

    async def _retried(self, attempt: Callable[[], Any], ends: float) -> Any:
        def note() -> None:
            self.traffic.retries += 1

        return await retried(attempt, ends, note)

    async def _abort_when(self, stopped: asyncio.Event, jobs: Sequence[_Job]) -> None:
        """Once `stopped` is set, ask the servers again and again to end what is open."""
        await stopped.wait()
        while True:
            open_jobs = [job for job in jobs if job.rid and job.member is not None]
            await asyncio.gather(
                *(self._abort(member.client, job.rid) for job in open_jobs for member in self._holders(job))
            )
            await asyncio.sleep(0.5)

    def _holders(self, job: _Job) -> list[Member]:
        """The servers that may hold a job's request: one, or any behind a router."""
        if self._router is not None:
            return self._fleet.members
        return [] if job.member is None else [job.member]

    async def _abort(self, client: ServerClient, rid: str) -> None:
        """Best effort: a request that is not aborted ends by itself, and its answer is dropped."""
        try:
            body = {"rid": rid, "abort_all": False}
            await client.post("/abort_request", body, deadline=_ABORT_SECONDS, phase="abort")
        except ServerError as error:
            logger.debug("%s", error)
