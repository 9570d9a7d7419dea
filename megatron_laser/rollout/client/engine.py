"""`SglangEngine`: SGLang servers behind the calls of a `RolloutEngine`, and what it needs of whoever moves weights."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from megatron_laser.rollout.client.driver import Driver
from megatron_laser.rollout.client.errors import ServerError
from megatron_laser.rollout.client.event_loop import SLACK, LoopThread
from megatron_laser.rollout.client.fleet import Fleet, Member
from megatron_laser.rollout.client.health import Limits
from megatron_laser.rollout.client.http import ServerClient, Sessions
from megatron_laser.rollout.client.identify import (
    Expected,
    StartupCheck,
    identify_member,
    identify_members,
)
from megatron_laser.rollout.client.load_watch import LoadWatch
from megatron_laser.rollout.client.responses import Weights, require_finished
from megatron_laser.rollout.client.router import Router
from megatron_laser.rollout.endpoints import ServerEndpoint
from megatron_laser.rollout.engine import StopEarly
from megatron_laser.rollout.open_files import raise_open_files
from megatron_laser.rollout.sglang_api import ServerFacts
from megatron_laser.types import Generation, SamplingParams

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class WeightTransport(Protocol):
    """Moves one stream of weights to all servers; see `megatron_laser.weight_sync`."""

    def send(
        self, engine: SglangEngine, weights: Iterable[tuple[str, torch.Tensor]], version: int, label: str
    ) -> None:
        """Give every server that can be updated these weights under the name `label`."""
        ...

    def close(self) -> None:
        """Leave process groups, delete files; safe to call twice."""
        ...


class SglangEngine:
    """A `ResumableEngine` over SGLang servers.

    `version` counts the weights that this engine has sent; before the first sync the servers hold what they
    were started with, and answers are taken as they come.
    """

    def __init__(
        self,
        source: Callable[[], Sequence[ServerEndpoint]],
        *,
        api_key: str | None,
        expected: Expected,
        max_concurrency_per_server: int = 256,
        router_url: str | None = None,
        min_servers: int = 1,
        start_deadline: float = 600.0,
        servers_deadline: float = 900.0,
        sync_deadline: float = 600.0,
        hang_deadline: float = 120.0,
        transport: WeightTransport | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Connect, wait for `min_servers`, and ask each who it is.

        Args:
            source: the servers as they are now; asked again while the engine lives.
            expected: what their model must be.
            max_concurrency_per_server: requests that are open at once on each; with a router, so many times the
                servers through it.
            start_deadline: seconds until `min_servers` must answer.
            on_close: called at the end of `close`: whoever started the servers ends them.

        Raises:
            ServersLost, ConfigError: they do not; so many requests to each are beyond the limit of open files.
            ServerMismatch, ServerRefused: one cannot be used, is no SGLang server, or wants another key.
        """
        raise_open_files(max_concurrency_per_server, max(1, len(source())))
        self.session = secrets.token_hex(4)  # weights of an earlier life of this run are not ours
        self.api_key = api_key
        self.transport = transport
        self._on_close = on_close
        self._expected = expected
        self._version = 0
        self._synced = False
        self._closed = False
        self._thread = LoopThread("rollout servers")
        limits = Limits(start=start_deadline, update=sync_deadline, silence=hang_deadline)

        async def connect() -> tuple[Sessions, Fleet, Driver, LoadWatch]:
            sessions = Sessions(api_key)
            fleet = Fleet(
                source,
                sessions,
                limits=limits,
                min_servers=min_servers,
                servers_deadline=servers_deadline,
                per_server=max_concurrency_per_server,
            )
            fleet.identify = functools.partial(identify_member, expected=expected, deadline=SLACK)
            router = None
            if router_url is not None:
                router = Router(ServerClient(router_url, sessions), probe_deadline=fleet.probe_deadline)
            driver = Driver(fleet, vocab_size=expected.vocab_size, router=router)
            fleet.watch()
            return sessions, fleet, driver, LoadWatch(fleet, router=router is not None)

        self._sessions, self.fleet, self._driver, self._loads = self.run(connect(), 30.0, "connecting")
        try:
            check = StartupCheck(min_servers, start_deadline)
            up = self.fleet.wait_until_up(min_servers, start_deadline, check)
            self.run(up, start_deadline, "waiting for servers")
            self.identify_all()
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls,
        urls: Sequence[str],
        *,
        api_key: str | None,
        expected: Expected,
        deadline: float,
        max_concurrency_per_server: int = 256,
        router_url: str | None = None,
    ) -> SglangEngine:
        """Use servers with the weights that they hold. Raises as the constructor does; `deadline` in seconds."""
        endpoints = [ServerEndpoint(url.rstrip("/")) for url in urls]
        return cls(
            lambda: endpoints,
            api_key=api_key,
            expected=expected,
            max_concurrency_per_server=max_concurrency_per_server,
            router_url=router_url,
            min_servers=len(endpoints),
            start_deadline=deadline,
        )

    @property
    def version(self) -> int:
        """Version of the weights that the next call will use."""
        return self._version

    @property
    def takes_seeds(self) -> bool:
        """Whether `sampling.seed` decides what is sampled: every server was started with deterministic inference."""
        return all(member.takes_seeds for member in self.fleet.identified())

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop in which all connections live."""
        return self._thread.loop

    @property
    def needs_weights(self) -> bool:
        """Whether the servers have not been given the trainer's weights yet."""
        return not self._synced

    def label(self, version: int) -> str:
        """The servers' name for this engine's weights of `version`."""
        return f"{self.session}-{version}"

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Callable[[int, int, Generation], None] | None = None,
        stop: StopEarly | None = None,
    ) -> list[list[Generation]]:
        """See `RolloutEngine.generate`; `on_finished` is called in a thread beside the event loop's.

        Raises also WeightsNeeded and ServersLost (see `Fleet.pick`) and ServerError."""
        found = self.generate_some(prompts, sampling, deadline=deadline, on_finished=on_finished, stop=stop)
        return [[require_finished(generation) for generation in group] for group in found]

    def generate_some(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Callable[[int, int, Generation], None] | None = None,
        resume: Mapping[tuple[int, int], Generation] | None = None,
        stop: StopEarly | None = None,
    ) -> list[list[Generation | None]]:
        """See `ResumableEngine.generate_some`."""
        self._check_ids(prompts)
        if sampling.score_token_id is not None:
            self._check_ids([[sampling.score_token_id]])
        work = self._driver.generate(
            prompts,
            sampling,
            self._weights(),
            ends=time.monotonic() + deadline,
            on_finished=on_finished,
            resume=resume or {},
            stop=stop,
        )
        return self.run(work, deadline, "generation")

    def score(self, sequences: Sequence[Sequence[int]], token_id: int, *, deadline: float) -> list[float]:
        """See `RolloutEngine.score`. Raises as `generate` does."""
        return [row[0] for row in self.score_tokens(sequences, (token_id,), deadline=deadline)]

    def score_tokens(
        self, sequences: Sequence[Sequence[int]], token_ids: Sequence[int], *, deadline: float
    ) -> list[list[float]]:
        """See `token_scores.ScoresTokens`: one request for each sequence. Raises as `generate` does."""
        self._check_ids(sequences)
        self._check_ids([token_ids])
        work = self._driver.score(sequences, token_ids, self._weights(), ends=time.monotonic() + deadline)
        return self.run(work, deadline, "scoring")

    async def generate_one(
        self, ids: Sequence[int], sampling: SamplingParams, *, ends: float, cached_on: dict[int, Member]
    ) -> Generation:
        """One response, for code that is awaited in `loop`; cancelled, its request is aborted on the server.

        Args:
            ends: by time.monotonic().
            cached_on: see `Driver.generate_one`.

        Raises as `generate` does.
        """
        self._check_ids([ids])
        work = self._driver.generate_one(ids, sampling, self._weights(), ends=ends, cached_on=cached_on)
        return require_finished(await work)

    async def score_one(
        self, ids: Sequence[int], token_ids: Sequence[int], *, ends: float, cached_on: Mapping[int, Member]
    ) -> list[float]:
        """Log-probs of tokens at one place; as `generate_one`."""
        self._check_ids([ids, token_ids])
        return await self._driver.score_one(ids, token_ids, self._weights(), ends=ends, cached_on=cached_on)

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`; by the engine's transport.

        Raises RuntimeError without one, and what the transport raises.
        """
        if self.transport is None:
            raise RuntimeError("these servers are used as they are: the engine has no weight transport")
        self.transport.send(self, weights, version, self.label(version))
        self._version = version
        self._synced = True

    def identify_all(self) -> dict[str, ServerFacts]:
        """Ask every server that answers who it is. Raises ServerError: one cannot be used."""
        facts = {}
        for member, found in self._identify(self.fleet.updatable()).items():
            if isinstance(found, ServerError):
                raise found
            facts[member.url] = found
        return facts

    def identify_late(self) -> dict[Member, ServerError]:
        """Ask servers that came up after this engine was opened who they are; returns those that cannot be used.

        No server is given weights before it has said who it is: whoever sends some calls this first, and a server
        that catches up by itself is asked by the fleet.
        """
        found = self._identify(self.fleet.late())
        return {member: error for member, error in found.items() if isinstance(error, ServerError)}

    def _identify(self, members: Sequence[Member]) -> dict[Member, ServerFacts | ServerError]:
        if not members:
            return {}
        work = identify_members(members, self._expected, deadline=SLACK)
        return self.run(work, 3 * SLACK, "identifying servers")

    def take_metrics(self) -> dict[str, float]:
        """See `ResumableEngine.take_metrics`."""
        members = self.fleet.members
        counted = self.on_loop(lambda: self._driver.stats.take() | self._loads.take())
        return counted | {
            "rollout/servers": float(len(members)),
            "rollout/servers_healthy": float(len(self.fleet.available())),
            "rollout/server_deaths": float(sum(member.health.deaths for member in members)),
        }

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While it lasts, servers are asked how busy they are; `take_metrics` says what came of it."""
        with suppress(RuntimeError):  # the engine has been closed: whoever generates hears of it
            self.loop.call_soon_threadsafe(self._loads.begin)
        try:
            yield
        finally:
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._loads.end)

    @property
    def busy_seconds(self) -> tuple[float, float]:
        """Of what was `watched` so far: seconds of which something is known, and in which a server had something to do,
        mean over servers."""
        return self._loads.known_seconds, self._loads.busy_seconds

    @property
    def num_gpus(self) -> int:
        """GPUs of all servers that have said who they are, dead ones too; on CPUs their processes."""
        return sum(member.tensor for member in self.fleet.identified())

    def run(self, work: Coroutine[Any, Any, T], deadline: float, phase: str) -> T:
        """Run `work` in the event loop's thread; raises TimeoutError a little after `deadline` seconds."""
        return self._thread.run(
            work, deadline, lambda: f"{phase}: not done in {deadline:g} s; {self._servers()}"
        )

    def _servers(self) -> str:
        return self.fleet.describe() if hasattr(self, "fleet") else "not connected yet"

    def on_loop(self, call: Callable[[], T]) -> T:
        """Run a short function in the event loop's thread."""

        async def work() -> T:
            return call()

        return self.run(work(), SLACK, "asking the event loop")

    def take_busy(self) -> list[tuple[str, float, float]]:
        """When each server had requests of this engine since the last call: (url, start, end) by
        `time.perf_counter`. Through a router nobody knows which server has which."""
        busy = self._driver.busy
        return [busy.popleft() for _ in range(len(busy))]

    def close(self) -> None:
        """End requests and connections; servers that others started stay as they are."""
        if self._closed:
            return
        self._closed = True
        if self.transport is not None:
            self.transport.close()

        async def leave() -> None:
            await self.fleet.close()
            await self._sessions.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        try:
            if hasattr(self, "fleet"):
                self._thread.run(leave(), 10.0, lambda: "the connections to the servers did not close")
        except TimeoutError as error:
            logger.warning("%s", error)
        self._thread.stop()
        if self._on_close is not None:
            self._on_close()

    def _weights(self) -> Weights:
        return Weights(self.label(self._version) if self._synced else None, self._version)

    def _check_ids(self, sequences: Sequence[Sequence[int]]) -> None:
        # An id outside the vocabulary does not come back as an error: it kills the server.
        limit = self._expected.vocab_size
        for index, ids in enumerate(sequences):
            if not ids:
                raise ValueError(f"sequence {index} is empty")
            if min(ids) < 0 or max(ids) >= limit:
                bad = next(i for i in ids if not 0 <= i < limit)
                raise ValueError(
                    f"sequence {index} has token id {bad}; expected 0 to {limit - 1}, the model's vocabulary"
                )
