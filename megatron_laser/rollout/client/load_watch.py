"""How busy the servers are while a rollout runs: each is asked now and then, and what it says counts by time.

Nothing of a rollout depends on it. An answer has two seconds, one that does not come is left out, and a server that
cannot say is not asked again; requests that this process has open there then say whether it has something to do.
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


@dataclass
class LoadWatch:
    """Asks the members of `fleet` between `begin` and `end`; all calls are made in its event loop.

    router: requests go through a router, so that this process does not know which server has them.
    """

    fleet: Fleet
    router: bool = False
    clock: Callable[[], float] = time.monotonic
    _sums: _Sums = field(default_factory=_Sums)
    _seconds: float = 0.0
    _since: float = 0.0  # when what was heard last began to hold
    _began: float = 0.0
    _last: dict[str, ServerLoad | bool] = field(default_factory=dict)
    _mute: set[tuple[str, int]] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """A rollout, or another part of one, begins."""
        if self._task is None:
            self._began = self._since = self.clock()
            self._last = {}
            self._task = asyncio.get_running_loop().create_task(self._watch())

    def end(self) -> None:
        """It ended."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
            self._count(self._last)
            self._seconds += self.clock() - self._began

    def take(self) -> dict[str, float]:
        """servers/... since the last call; {} where no server has been heard of."""
        sums, seconds = self._sums, self._seconds
        self._sums, self._seconds = _Sums(), 0.0
        if sums.known <= 0.0:
            return {}
        utilisation = sums.busy / sums.known
        found = {"servers/utilisation": utilisation, "servers/busy_seconds": utilisation * seconds}
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
                self._count({m.url: a for m, a in zip(members, answers, strict=True) if a is not None})
                elapsed = self.clock() - self._began
                pause = min(_LONGEST, max(_SHORTEST, _GROWTH * elapsed))
                pause = max(pause, len(members) / _ASKED_A_SECOND)
        except Exception as error:  # whatever it is, the rollout goes on
            logger.warning("servers are not asked for their load in this rollout any more: %r", error)

    def _count(self, loads: dict[str, ServerLoad | bool]) -> None:
        """`loads` held since the ones before were heard."""
        now = self.clock()
        seconds, self._since, self._last = now - self._since, now, loads
        for load in loads.values():
            self._sums.known += seconds
            if isinstance(load, bool):
                self._sums.busy += seconds * load
                continue
            self._sums.told += seconds
            self._sums.busy += seconds * (load.running + load.queued > 0)
            self._sums.running += seconds * load.running
            self._sums.queued += seconds * load.queued
            self._sums.kv_usage += seconds * load.kv_usage

    async def _ask(self, member: Member) -> ServerLoad | bool | None:
        """What it has to do, whether it has something to do, or None: unknown."""
        if member.health.state in _NOT_THERE:
            return IDLE
        process = (member.url, member.start)
        if process not in self._mute:
            try:
                answer = await member.client.get(LOADS, deadline=_ANSWER_SECONDS, phase="load")
                load = parse_load(answer)
                if load is not None:
                    return load
                self._silence(member, f"answered {str(answer)[:200]}")
            except (ServerRefused, UnexpectedAnswer) as error:
                self._silence(member, str(error))
            except ServerError as error:
                logger.debug("%s", error)
                return None
        return None if self.router else bool(member.running)

    def _silence(self, member: Member, why: str) -> None:
        self._mute.add((member.url, member.start))
        logger.info(
            "server %s does not say what it has to do (%s): servers/running_mean, queued_mean and kv_usage_mean leave "
            "it out",
            member.url,
            why,
        )
