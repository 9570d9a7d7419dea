"""What servers on the trainer's GPUs hold in memory: their weights, key/value cache and CUDA graphs.

SGLang (started with its memory saver) gives each back and takes it again by tag. A tag that is given back twice, or
taken again without having been given back, ends its scheduler, and so does any request that runs meanwhile. So what
each server process holds is kept track of here, and generation is paused and flushed first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.errors import ServerError
from megatron_laser.rollout.client.fleet import Member
from megatron_laser.rollout.client.health import RequestFailed, State, UpdateDone, UpdateFailed
from megatron_laser.rollout.sglang_api import (
    CONTINUE_GENERATION,
    MEMORY_TAGS,
    PAUSE_GENERATION,
    RELEASE_MEMORY_OCCUPATION,
    RESUME_MEMORY_OCCUPATION,
    continue_body,
    memory_body,
    pause_body,
)
from megatron_laser.weight_sync.update import flush

logger = logging.getLogger(__name__)

CACHE, WEIGHTS, GRAPHS = MEMORY_TAGS
ALL_TAGS = frozenset({CACHE, WEIGHTS, GRAPHS})

_ABSENT = (State.STARTING, State.RESTARTING, State.DEAD)


class ServerMemory:
    """The memory of all servers of an engine. A server that fails is left out until it is synced again."""

    def __init__(self, engine: SglangEngine, *, seconds: float) -> None:
        """Args: seconds: for one call, over all servers."""
        self._engine = engine
        self._seconds = seconds
        # By process: one that was started again holds everything.
        self._released: dict[tuple[Member, int], set[str]] = {}

    def held(self, member: Member) -> frozenset[str]:
        """The tags that a server's current process has in device memory."""
        return ALL_TAGS - self._released.get((member, member.start), set())

    def release(self, tags: Collection[str]) -> None:
        """Let every server give back `tags`; generation stays paused from then on."""

        async def one(member: Member) -> None:
            phase = "giving back memory"
            leaving = [tag for tag in (CACHE, WEIGHTS, GRAPHS) if tag in tags and tag in self.held(member)]
            if not leaving:
                return
            await self._post(member, PAUSE_GENERATION, pause_body(), phase)
            # An aborted batch may still be on the device for a moment; giving memory back would end the server then.
            give_up = time.monotonic() + self._seconds
            await flush(member, ends=give_up + self._seconds, give_up=give_up, phase=phase)
            await self._post(member, RELEASE_MEMORY_OCCUPATION, memory_body(leaving), phase)
            self._released.setdefault((member, member.start), set()).update(leaving)

        self._all(one, "servers give back memory")

    def resume(self, tags: Collection[str]) -> str:
        """Let every server take `tags` again; with all of them, generation goes on.

        Returns:
            "" or, when generation should go on and no server can, why.
        """
        go_on = set(tags) >= ALL_TAGS

        async def one(member: Member) -> None:
            phase = "taking memory again"
            wanted = [tag for tag in (WEIGHTS, GRAPHS, CACHE) if tag in tags and tag not in self.held(member)]
            for tag in wanted:  # the cache last: the others must find room
                await self._post(member, RESUME_MEMORY_OCCUPATION, memory_body([tag]), phase)
                self._released[member, member.start].discard(tag)
            if go_on:
                await self._post(
                    member, CONTINUE_GENERATION, continue_body(empty_cache=True), "continuing generation"
                )
                fleet, label = self._engine.fleet, self._engine.label(self._engine.version)
                fleet.wanted = label
                fleet.handle(member, UpdateDone(label))  # ignored unless it was being updated

        failures = self._all(one, "servers take memory again")
        if go_on and failures and not self._engine.on_loop(self._engine.fleet.available):
            return f"no server can generate: {'; '.join(failures)}"
        return ""

    def _all(self, work: Callable[[Member], Awaitable[None]], phase: str) -> list[str]:
        """`work` for all servers that are there, at once; returns what went wrong."""

        async def guarded(member: Member) -> str | None:
            try:
                await work(member)
            except ServerError as error:
                logger.warning("%s", error)
                updating = member.health.state is State.UPDATING
                event = UpdateFailed(str(error)) if updating else RequestFailed(str(error), gone=error.gone)
                self._engine.fleet.handle(member, event)
                return str(error)
            return None

        async def everyone(members: Sequence[Member]) -> list[str | None]:
            return await asyncio.gather(*(guarded(member) for member in members))

        present = [member for member in self._engine.fleet.members if member.health.state not in _ABSENT]
        # Each of a server's few requests has the deadline of the whole.
        found = self._engine.run(everyone(present), 4 * self._seconds, phase)
        return [failure for failure in found if failure is not None]

    async def _post(self, member: Member, path: str, body: dict[str, object], phase: str) -> None:
        await member.client.post(path, body, deadline=self._seconds, phase=phase)
