"""How requests of many functions at once reach an engine: to servers one by one, to others gathered into batches."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.fleet import Member
from megatron_laser.rollout.engine import RolloutEngine, StopEarly
from megatron_laser.rollout.sglang_api import response_seed
from megatron_laser.rollout.token_scores import token_scores
from megatron_laser.types import Generation, SamplingParams

T = TypeVar("T")

Place = tuple[int, int, int]
"""(prompt, sample, number of the request in it): what seeds are made of, and the order within a batch."""

_QUIET = 0.02  # seconds without a further request after which those that wait are served
_BEHIND_THE_END = (
    10.0  # seconds; whoever asked has been cancelled by then, and no server is to be blamed for that
)


class Requests(Protocol):
    """Where handles send what functions ask for; used in one event loop, for one round of a step's rollout."""

    async def generate(self, ids: list[int], sampling: SamplingParams, place: Place) -> Generation:
        """One response behind `ids`."""
        ...

    async def score(self, ids: list[int], token_ids: tuple[int, ...], place: Place) -> list[float]:
        """log pi(token | ids) at temperature 1 of each of `token_ids`."""
        ...

    def begun(self, samples: int) -> None:
        """So many functions run now."""
        ...

    def ended(self) -> None:
        """One of them has ended."""
        ...

    async def close(self) -> None:
        """Nothing is asked for any more: end what is under way."""
        ...


class ServerRequests:
    """Through an `SglangEngine`: its concurrency limit, retries, deaths and weight versions are its own business."""

    def __init__(self, engine: SglangEngine, *, ends: float) -> None:
        self._engine = engine
        self._ends = ends + _BEHIND_THE_END
        self._cached_on: dict[int, dict[int, Member]] = defaultdict(dict)

    async def generate(self, ids: list[int], sampling: SamplingParams, place: Place) -> Generation:
        """See `Requests`. Raises as `SglangEngine.generate` does."""
        if (
            sampling.seed is not None
        ):  # of the request: a server makes its random numbers of seed and position alone
            sampling = replace(sampling, seed=response_seed(sampling.seed, *place[:2]) + place[2])
        # All turns of all samples of a prompt go to one server: its prefix cache has what they begin with.
        cached_on = self._cached_on[place[0]]
        return await self._there(
            self._engine.generate_one(ids, sampling, ends=self._ends, cached_on=cached_on)
        )

    async def score(self, ids: list[int], token_ids: tuple[int, ...], place: Place) -> list[float]:
        """See `Requests`."""
        cached_on = self._cached_on[place[0]]
        return await self._there(self._engine.score_one(ids, token_ids, ends=self._ends, cached_on=cached_on))

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        # A cancelled request is cancelled in the engine's loop as well, and then aborted on its server.
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._engine.loop))

    def begun(self, samples: int) -> None:
        """Nothing waits for others."""
        return None

    def ended(self) -> None:
        """Nothing waits for others."""
        return None

    async def close(self) -> None:
        """Each request was cancelled with its function."""
        return None


@dataclass(eq=False, slots=True)
class _Request:
    place: Place
    ids: list[int]
    sampling: SamplingParams | None  # None: a score
    token_ids: tuple[int, ...]  # of a score
    result: asyncio.Future[Any]


class GatheredRequests:
    """For an engine whose calls block: what waits at the same moment goes into one call.

    A call begins when every function that runs is waiting for the engine, or when for a moment no further request has
    come (others wait for their tools). Requests of a call are ordered by place: where functions wait for the engine
    alone, the same seed gives the same samples.
    """

    def __init__(self, engine: RolloutEngine, *, ends: float, seed: int, max_positions: int) -> None:
        self._engine = engine
        self._ends = ends
        self._seed = seed
        self._max_positions = max_positions
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout function's engine")
        self._waiting: list[_Request] = []
        self._running = 0
        self._calls = 0
        self._timer: asyncio.Handle | None = None
        self._serving: asyncio.Task[None] | None = None
        self._stop = StopEarly()

    async def generate(self, ids: list[int], sampling: SamplingParams, place: Place) -> Generation:
        """See `Requests`. Raises as the engine's `generate` does."""
        found: Generation = await self._put(_Request(place, ids, sampling, (), self._loop.create_future()))
        return found

    async def score(self, ids: list[int], token_ids: tuple[int, ...], place: Place) -> list[float]:
        """See `Requests`."""
        request = _Request(place, ids, None, token_ids, self._loop.create_future())
        found: list[float] = await self._put(request)
        return found

    def begun(self, samples: int) -> None:
        """See `Requests`."""
        self._running = samples

    def ended(self) -> None:
        """See `Requests`."""
        self._running -= 1
        self._plan()

    async def close(self) -> None:
        """End the call that is under way, soon, and wait for it."""
        self._stop.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._serving is not None:
            await asyncio.wait({self._serving})
        self._thread.shutdown(wait=False)

    async def _put(self, request: _Request) -> Any:
        self._waiting.append(request)
        self._plan()
        return await request.result

    def _plan(self) -> None:
        """Begin a call when it is time; asked again at every request, and at the end of a function and of a call."""
        if self._timer is not None:
            self._timer.cancel()
        if self._serving is not None or not self._waiting or self._stop.is_set:
            return
        if len(self._waiting) >= self._running:
            self._timer = self._loop.call_soon(self._begin)
        else:
            self._timer = self._loop.call_later(_QUIET, self._begin)

    def _begin(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._serving = self._loop.create_task(self._serve(waiting))

    async def _serve(self, waiting: list[_Request]) -> None:
        try:
            for part in self._calls_of([request for request in waiting if not request.result.done()]):
                await self._call(part)
        finally:
            for request in waiting:  # only after an error that is none of the engine's
                request.result.cancel()
            self._serving = None
            self._plan()

    def _calls_of(self, waiting: Sequence[_Request]) -> list[list[_Request]]:
        """Requests that can be one call of the engine: of one kind, with one set of stop tokens, and room for all."""
        kinds: dict[object, list[_Request]] = defaultdict(list)
        for request in sorted(waiting, key=lambda request: request.place):
            sampling = request.sampling
            kinds[(request.token_ids, sampling and replace(sampling, max_new_tokens=0, seed=None))].append(
                request
            )
        calls = []
        for requests in kinds.values():
            while requests:
                limit = max(_limit(request) for request in requests)
                fit = [request for request in requests if len(request.ids) + limit <= self._max_positions]
                # The one that asked for most has room for it, or its handle had not let it through.
                fit = fit or [max(requests, key=_limit)]
                calls.append(fit)
                requests = [request for request in requests if request not in fit]
        return calls

    async def _call(self, requests: list[_Request]) -> None:
        if self._stop.is_set:
            return
        stop = StopEarly()
        self._stop.on_set(stop.set)
        open_requests = len(requests)

        def heard(_: object) -> None:
            nonlocal open_requests
            open_requests -= 1
            if not open_requests:  # all have been given up
                stop.set()

        for request in requests:
            request.result.add_done_callback(heard)
        try:
            found = await self._loop.run_in_executor(self._thread, self._work(requests, stop))
        except Exception as error:
            for request in requests:
                if not request.result.done():
                    request.result.set_exception(error)
            return
        for request, result in zip(requests, found, strict=True):
            if not request.result.done():
                request.result.set_result(result)

    def _work(self, requests: list[_Request], stop: StopEarly) -> Callable[[], Sequence[Any]]:
        ids = [request.ids for request in requests]
        left = max(0.1, self._ends - time.monotonic())
        sampling, token_ids = requests[0].sampling, requests[0].token_ids
        if sampling is None:
            return lambda: token_scores(self._engine, ids, token_ids, deadline=left)
        self._calls += 1
        seed = _call_seed(self._seed, self._calls)
        longest = replace(sampling, max_new_tokens=max(map(_limit, requests)), seed=seed)

        def generate() -> list[Generation]:
            found = self._engine.generate(ids, longest, deadline=left, stop=stop)
            return [_cut(group[0], _limit(request)) for group, request in zip(found, requests, strict=True)]

        return generate


def requests_to(
    engine: RolloutEngine, sampling: SamplingParams, *, ends: float, max_positions: int
) -> Requests:
    """How to ask `engine`, in the running event loop: one by one where it is servers, else gathered into batches.

    Args:
        sampling: whose seed all samples have in common.
        ends: by time.monotonic(). max_positions: tokens that the model can read.
    """
    if isinstance(engine, SglangEngine):
        return ServerRequests(engine, ends=ends)
    seed = 0 if sampling.seed is None else sampling.seed
    return GatheredRequests(engine, ends=ends, seed=seed, max_positions=max_positions)


def _limit(request: _Request) -> int:
    return 0 if request.sampling is None else request.sampling.max_new_tokens


def _cut(generation: Generation, limit: int) -> Generation:
    """A response that was sampled beside longer ones, as it would have ended at its own limit."""
    if len(generation.response_ids) <= limit:
        return generation
    return Generation(
        generation.response_ids[:limit], generation.logprobs[:limit], "length", generation.weight_version
    )


def _call_seed(seed: int, call: int) -> int:
    """A stream of its own for each call."""
    digest = hashlib.sha256(f"{seed} {call}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
