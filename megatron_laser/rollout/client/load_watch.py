"""How busy the servers are while a rollout runs: each is asked now and then, and what it says counts by time.

Nothing of a rollout depends on it. An answer has two seconds, one that does not come is left out, and a server that
cannot say is not asked again. That a server has something to do is also known by requests that this process has open
there: what it says of itself may be a few decode steps old.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_laser.rollout.client.errors import ServerError, ServerRefused, UnexpectedAnswer
from megatron_laser.rollout.client.fleet import Fleet, Member
from megatron_laser.rollout.client.health import State
from megatron_laser.rollout.server_load import IDLE, ServerLoad, parse_load
from megatron_laser.rollout.sglang_api import LOADS

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 2.0
_FIRST = 0.05  # seconds after the rollout began
_SHORTEST, _LONGEST = 0.25, 2.0  # seconds between two rounds, of which a long rollout needs fewer
_GROWTH = 0.05  # of the rollout's seconds so far
_ASKED_A_SECOND = 50  # of all servers: each costs this process about half a millisecond
_NOT_THERE = (State.STARTING, State.DEAD, State.RESTARTING)


@dataclass
class _Sums:
    """Of all servers, each second counted once for each: known and with something to do; and of those that said what
    they have, integrals over time."""

    known: float = 0.0
    busy: float = 0.0
    told: float = 0.0
    running: float = 0.0
    queued: float = 0.0
    kv_usage: float = 0.0


@dataclass(frozen=True)
class _Heard:
    """Of one server: whether it has something to do, and what it says of it; None: nothing."""

    busy: bool
    load: ServerLoad | None


@dataclass
class LoadWatch:
    """Asks the members of `fleet` between `begin` and `end`; all calls are made in its event loop.

    router: requests go through a router, so that this process does not know which server has them.
    known_seconds, busy_seconds: seconds of rollouts since the engine was opened of which something is known, and in
    which a server has something to do, mean over servers. They only grow, and may be read in any thread.
    """

    fleet: Fleet
    router: bool = False
    clock: Callable[[], float] = time.monotonic
    known_seconds: float = 0.0
    busy_seconds: float = 0.0
    _sums: _Sums = field(default_factory=_Sums)
    _since: float = 0.0  # when what was heard last began to hold
    _began: float = 0.0
    _last: list[_Heard] = field(default_factory=list)
    _mute: set[tuple[str, int]] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """A rollout, or another part of one, begins."""
        if self._task is None:
            self._began = self._since = self.clock()
            self._last = []
            self._task = asyncio.get_running_loop().create_task(self._watch())

    def end(self) -> None:
        """It ended."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
            self._count(self._last)

    def take(self) -> dict[str, float]:
        """servers/... since the last call; {} where no server has been heard of."""
        sums, self._sums = self._sums, _Sums()
        if sums.known <= 0.0:
            return {}
        found = {"servers/utilisation": sums.busy / sums.known}
        if sums.told > 0.0:
            found["servers/running_mean"] = sums.running / sums.told
            found["servers/queued_mean"] = sums.queued / sums.told
            found["servers/kv_usage_mean"] = sums.kv_usage / sums.told
        return found

    async def _watch(self) -> None:
        pause = _FIRST
        try:
            while True:
                await asyncio.sleep(pause)
                members = self.fleet.members
                answers = await asyncio.gather(*(self._ask(member) for member in members))
                self._count([heard for heard in answers if heard is not None])
                elapsed = self.clock() - self._began
                pause = min(_LONGEST, max(_SHORTEST, _GROWTH * elapsed))
                pause = max(pause, len(members) / _ASKED_A_SECOND)
        except Exception as error:  # whatever it is, the rollout goes on
            logger.warning("servers are not asked for their load in this rollout any more: %r", error)

    def _count(self, heard: list[_Heard]) -> None:
        """`heard` held since what was heard before."""
        now = self.clock()
        seconds, self._since, self._last = now - self._since, now, heard
        if heard:
            self.known_seconds += seconds
            self.busy_seconds += seconds * sum(server.busy for server in heard) / len(heard)
        for server in heard:
            self._sums.known += seconds
            self._sums.busy += seconds * server.busy
            if (load := server.load) is not None:
                self._sums.told += seconds
                self._sums.running += seconds * load.running
                self._sums.queued += seconds * load.queued
                self._sums.kv_usage += seconds * load.kv_usage

    async def _ask(self, member: Member) -> _Heard | None:
        """None: nothing is known of it."""
        if member.health.state in _NOT_THERE:
            return _Heard(False, IDLE)
        process = (member.url, member.start)
        if process not in self._mute:
            try:
                answer = await member.client.get(LOADS, deadline=_ANSWER_SECONDS, phase="load")
                load = parse_load(answer)
                if load is not None:
                    return _Heard(load.running + load.queued > 0 or bool(member.running), load)
                self._silence(member, f"answered {str(answer)[:200]}")
            except (ServerRefused, UnexpectedAnswer) as error:
                self._silence(member, str(error))
            except ServerError as error:
                logger.debug("%s", error)
                return None
        return None if self.router else _Heard(bool(member.running), None)

    def _silence(self, member: Member, why: str) -> None:
        self._mute.add((member.url, member.start))
        logger.info(
            "server %s does not say what it has to do (%s): servers/running_mean, queued_mean and kv_usage_mean leave "
            "it out",
            member.url,
            why,
        )
