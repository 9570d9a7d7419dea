"""All servers of a run: who is up, who holds the wanted weights, and who gets the next request.

Lives in one event loop. A monitor probes every server; requests report what they see. Probes go through the
scheduler (`SERVER_INFO`), so one that hangs behind a live HTTP port is noticed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_laser.observability.events import say
from megatron_laser.rollout.client.errors import (
    OutOfFiles,
    ServerError,
    ServerMismatch,
    ServersLost,
    UnexpectedAnswer,
    WeightsNeeded,
)
from megatron_laser.rollout.client.health import (
    Answered,
    Event,
    Health,
    Limits,
    Missed,
    RequestDone,
    RequestFailed,
    Restarted,
    State,
    UpdateBegan,
    UpdateDone,
    UpdateFailed,
)
from megatron_laser.rollout.client.http import ServerClient, Sessions
from megatron_laser.rollout.endpoints import EndpointsError, ServerEndpoint
from megatron_laser.rollout.sglang_api import MODEL_INFO, SERVER_INFO, weight_version

logger = logging.getLogger(__name__)

PROBE_EVERY = 2.0  # seconds
_PROBE_DEADLINE = 10.0  # at most; three must fit into the hang deadline


@dataclass(eq=False)
class Member:
    """One server as the fleet sees it.

    Attributes:
        endpoint: what is published of it.
        start: which of its processes this is.
        tensor, device, takes_seeds: its tensor-parallel size, "cpu" or "cuda", and whether it samples by a request's
            seed, once it has been identified.
        expert_storage: of `ServerFacts`.
        unfit: it cannot be used, as it said when it was to catch up; the next weight update asks again.
        running: its open requests; they end when it dies.
        probe_error, probing: of the last probe, and the one that runs.
    """

    client: ServerClient
    health: Health
    endpoint: ServerEndpoint
    start: int = 0
    tensor: int = 1
    device: str | None = None
    takes_seeds: bool = False
    expert_storage: str = ""
    unfit: bool = False
    running: set[asyncio.Task[Any]] = field(default_factory=set)
    probe_error: ServerError | None = None
    probing: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return self.client.url

    @property
    def identified(self) -> bool:
        """Whether it has said who it is, and fits: see `SglangEngine.identify_late`."""
        return self.device is not None

    @property
    def load(self) -> float:
        """Open requests for each of its GPUs."""
        return len(self.running) / self.tensor


def log_level(states: set[State]) -> int:
    """How loudly a change between two states is told: every step has an update, and no update is news."""
    if states <= {State.HEALTHY, State.UPDATING}:
        return logging.DEBUG
    quiet = {State.HEALTHY, State.UPDATING, State.STARTING, State.DRAINING}
    return logging.INFO if states <= quiet else logging.WARNING


class Fleet:
    """The servers named by `source`, which is asked again before every round of probes."""

    def __init__(
        self,
        source: Callable[[], Sequence[ServerEndpoint]],
        sessions: Sessions,
        *,
        limits: Limits,
        min_servers: int = 1,
        servers_deadline: float = 900.0,
        per_server: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._sessions = sessions
        self._limits = limits
        self._clock = clock
        self._min_servers = min_servers
        self._servers_deadline = servers_deadline
        self.per_server = per_server  # requests at once
        self._members: dict[str, Member] = {}
        self._lost: set[str] = set()  # urls of which nobody has said yet that they are back
        self._monitor: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._short_since: float | None = None
        self._said_source = ""
        self.wanted: str | None = None
        # Asks a server who it is; raises for one that cannot be used.
        self.identify: Callable[[Member], Awaitable[object]] | None = None
        # Gives a server that came back the current weights, without the trainer; returns their name.
        self.catch_up: Callable[[Member], Awaitable[str]] | None = None
        # Called when a server has fallen silent behind an open port, which breaks no connection.
        self.on_hang: Callable[[], None] | None = None
        # Called when it may have changed who takes new requests.
        self.on_change: Callable[[], None] | None = None
        self._look()

    @property
    def members(self) -> list[Member]:
        """All servers, dead ones too."""
        return list(self._members.values())

    def available(self) -> list[Member]:
        """Those that take new requests."""
        return [member for member in self.members if member.health.takes_work(self.wanted)]

    def updatable(self) -> list[Member]:
        """Those that weights can be sent to."""
        return [member for member in self.members if member.health.can_be_updated()]

    def identified(self) -> list[Member]:
        """Those that have said who they are, dead ones too."""
        return [member for member in self.members if member.identified]

    def late(self) -> list[Member]:
        """Those that came up after the engine was opened, and have not said who they are or do not fit."""
        return [member for member in self.updatable() if not member.identified]

    def describe(self) -> str:
        """One line: every server with its state and why."""
        now = self._clock()
        parts = []
        for member in self.members:
            health = member.health
            text = f"{member.url} {health.state.value} for {now - health.since:.0f} s"
            if health.state is State.HEALTHY and self.wanted is not None and health.version != self.wanted:
                text += f", holds weights {health.version!r} instead of {self.wanted!r}"
            parts.append(text + (f" ({health.reason})" if health.reason else ""))
        return "; ".join(parts) or "no server is known"

    @property
    def probe_deadline(self) -> float:
        """Seconds for the answer to a probe."""
        return min(_PROBE_DEADLINE, self._limits.silence / 3)

    def watch(self) -> None:
        """Start the monitor."""
        self._monitor = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop the monitor and its probes."""
        tasks = [self._monitor, *(member.probing for member in self.members)]
        running = [task for task in tasks if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def handle(self, member: Member, event: Event) -> None:
        """Feed one event to a server's state; ends its open requests when it died or has a new process."""
        before = member.health
        member.health = after = before.after(event, self._clock(), self._limits)
        if before.state is not after.state:
            level = log_level({before.state, after.state})
            logger.log(
                level,
                "server %s: %s -> %s%s",
                member.url,
                before.state.value,
                after.state.value,
                f" ({after.reason})" if after.reason else "",
            )
            self._note(member)
            if after.state in (State.DEAD, State.RESTARTING):
                for task in list(member.running):
                    task.cancel()
                if self.on_hang is not None and isinstance(event, Missed) and not event.refused:
                    self.on_hang()
        self._changed.set()
        if self.on_change is not None:
            self.on_change()

    def _note(self, member: Member) -> None:
        """Say that a server is lost, was started again, or is back; a weight update is nothing to tell."""
        url, health = member.url, member.health
        if health.state in (State.DEAD, State.RESTARTING):
            self._lost.add(url)
            what = "is lost" if health.state is State.DEAD else "was started again"
            say("server", f"{url} {what}{f': {health.reason}' if health.reason else ''}")
        elif health.state is State.HEALTHY and url in self._lost:
            self._lost.discard(url)
            say("server", f"{url} is back")

    async def pick(self, phase: str, preferred: Member | None = None, failed: Member | None = None) -> Member:
        """The server for the next request: `preferred` if it takes work, else the least loaded; waits for one.

        None gets more than `per_server` requests, but where another has just died and left its own to the others.

        Args:
            phase: what the request is for, for messages.
            failed: a server that the request has failed on: any other one comes first.

        Raises:
            ServersLost: fewer than `min_servers` take work since `servers_deadline` seconds.
            WeightsNeeded: too few take work, but with new weights enough would.
        """
        while True:
            available = self.available()
            if len(available) >= self._min_servers:
                self._short_since = None
                free = [member for member in available if len(member.running) < self.per_server] or available
                if preferred is not None and preferred in free and preferred is not failed:
                    return preferred
                return min(free, key=lambda member: (member is failed, member.load))
            self._check_shortage(phase, len(available))
            await self._change(1.0)

    def _check_shortage(self, phase: str, available: int) -> None:
        now = self._clock()
        if self._short_since is None:
            self._short_since = now
            logger.warning(
                "%s: %d of %d servers take work, rollout.min_servers is %d; waiting: %s",
                phase,
                available,
                len(self._members),
                self._min_servers,
                self.describe(),
            )
        if len(self.updatable()) >= self._min_servers:
            raise WeightsNeeded(f"{phase}: servers came back without the current weights: {self.describe()}")
        if now - self._short_since > self._servers_deadline:
            raise ServersLost(
                f"{phase}: fewer than rollout.min_servers {self._min_servers} healthy servers for more than "
                f"rollout.servers_deadline {self._servers_deadline:g} s: {self.describe()}"
            )

    async def wait_until_up(
        self, count: int, deadline: float, check: Callable[[Sequence[Member]], None] = lambda members: None
    ) -> list[Member]:
        """The servers that answer, once they are `count` or more; `check` may raise what waiting would not change.

        Raises:
            ServersLost: they are not within `deadline` seconds.
        """
        ends = self._clock() + deadline
        while len(self.updatable()) < count:
            check(self.members)
            if self._clock() > ends:
                raise ServersLost(
                    f"{len(self.updatable())} of {count} servers answered within {deadline:g} s: {self.describe()}"
                )
            await self._change(0.5)
        return self.updatable()

    async def _change(self, longest: float) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), longest)
        except TimeoutError:
            return

    async def _watch(self) -> None:
        while True:
            self._look()
            for member in self.members:
                # Each on its own: one that hangs, or catches up for minutes, must not hide what befalls another.
                if member.probing is None or member.probing.done():
                    member.probing = asyncio.create_task(self.probe(member))
            await asyncio.sleep(PROBE_EVERY)

    async def ask_again(self, member: Member) -> None:
        """Wait for what a server says of itself; many may ask at once, and it is asked once."""
        if member.probing is None or member.probing.done():
            member.probing = asyncio.create_task(self.probe(member))
        await asyncio.wait([member.probing])

    async def probe(self, member: Member) -> None:
        """Ask scheduler and HTTP process once; feeds what they say to the server's state."""
        client = member.client
        try:
            await client.get(SERVER_INFO, deadline=self.probe_deadline, phase="probe")
            info = await client.get(MODEL_INFO, deadline=self.probe_deadline, phase="probe")
            version = weight_version(info)
            if version is None:
                raise UnexpectedAnswer(member.url, "probe", f"{MODEL_INFO} names no weight_version")
        except OutOfFiles as error:
            member.probe_error = error
        except ServerError as error:
            member.probe_error = error
            refused = error.gone and "Connect call failed" in str(error)
            self.handle(member, Missed(str(error), refused=refused))
        else:
            member.probe_error = None
            if version != member.health.version or member.health.state is not State.HEALTHY:
                self.handle(member, Answered(version))
            else:
                member.health = member.health.after(Answered(version), self._clock(), self._limits)
        stale = member.health.state is State.HEALTHY and not member.health.takes_work(self.wanted)
        if stale and not member.unfit and self.wanted is not None and self.catch_up is not None:
            await self._catch_up(member, self.catch_up)

    async def _catch_up(self, member: Member, catch_up: Callable[[Member], Awaitable[str]]) -> None:
        self.handle(member, UpdateBegan())
        try:
            if not member.identified and self.identify is not None:
                await self.identify(member)
            self.handle(member, UpdateDone(await catch_up(member)))
        except Exception as error:  # whatever it is, the server must not stay in `updating`
            member.unfit = isinstance(error, ServerMismatch)
            self.handle(member, UpdateFailed(str(error) or repr(error)))

    def _look(self) -> None:
        """Take over what `source` says: new servers, new processes, servers that are no more."""
        try:
            endpoints = self._source()
        except EndpointsError as error:
            if str(error) != self._said_source:
                logger.warning("%s", error)
                self._said_source = str(error)
            return
        named = {endpoint.url for endpoint in endpoints}
        for endpoint in endpoints:
            member = self._members.get(endpoint.url)
            if member is None:
                client = ServerClient(endpoint.url, self._sessions)
                health = Health.fresh(self._clock())
                self._members[endpoint.url] = Member(client, health, endpoint, endpoint.start)
                continue
            member.endpoint = endpoint
            if endpoint.start > member.start:
                member.start, member.unfit = endpoint.start, False
                self.handle(member, Restarted())
        for url in set(self._members) - named:
            member = self._members.pop(url)
            logger.warning("server %s is no longer among the endpoints", url)
            for task in list(member.running):
                task.cancel()

    def succeeded(self, member: Member) -> None:
        """A request to it came back."""
        member.health = member.health.after(RequestDone(), self._clock(), self._limits)

    def failed(self, member: Member, error: ServerError) -> None:
        """A request to it failed."""
        self.handle(member, RequestFailed(str(error), gone=error.gone))
