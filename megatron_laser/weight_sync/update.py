"""A weight update: the stream to the engine, and its steps on all servers: pause, flush, send, check, continue.

The order matters. Weights that change under a running request mix two policies in one response, and a disk update
without a pause has been seen to answer 400 after it had changed the weights. A server that fails a step is left out
and keeps no name of the run's weights, so nothing is generated on it before it has been synced again.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.errors import ServerError, ServerFault, ServerRefused, StaleServer
from megatron_laser.rollout.client.fleet import Member
from megatron_laser.rollout.client.health import UpdateBegan, UpdateDone, UpdateFailed
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.rollout.sglang_api import (
    BEGIN_WEIGHT_UPDATE,
    CONTINUE_GENERATION,
    END_WEIGHT_UPDATE,
    FLUSH_CACHE,
    MODEL_INFO,
    PAUSE_GENERATION,
    continue_body,
    pause_body,
    refusal,
    weight_version,
)

logger = logging.getLogger(__name__)

_STEP_SECONDS = 60.0
_FLUSH_SECONDS = 20.0  # until a cache that cannot be flushed is given up
_FLUSH_PAUSE = 0.1  # seconds between two tries


def sync_weights(
    stream: Iterable[tuple[str, torch.Tensor]], engine: RolloutEngine | None, version: int
) -> str | None:
    """Feed `stream` to the engine on rank 0; take part in its collectives on the other ranks.

    Args:
        stream: the trainer's `weight_stream()`. Every rank must pass its own and call this function.
        engine: None on ranks without one.
        version: the step whose weights these are.

    Returns:
        None, or, on rank 0, why the servers do not have the weights although another attempt may succeed: a
        server died on the way. The stream has then been run to its end, so that no rank waits in it.

    Raises:
        RuntimeError: the engine does not report `version` afterwards.
        SyncFailed: what another attempt would not mend.
        (A folder that cannot be written, with `weight_sync: disk`, is told like a server that died.)
    """
    stream = iter(stream)
    if engine is None:
        deque(stream, maxlen=0)  # gathers are collectives: all ranks must run them
        return None
    try:
        engine.update_weights(stream, version)
    except (SyncFailed, ServerError, OSError) as error:
        if isinstance(error, SyncFailed) and not error.retry:
            raise
        logger.warning("weight sync of step %d: %s", version, error)
        deque(stream, maxlen=0)
        return str(error)
    if engine.version != version:
        raise RuntimeError(
            f"weight sync: the engine reports version {engine.version} after an update to {version}; "
            "its rollouts would come from other weights than the trainer's"
        )
    return None


class SyncFailed(RuntimeError):
    """A weight sync that did not reach the servers as it should; `retry`: another attempt may."""

    def __init__(self, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


class Update:
    """One update of several servers. `members` shrinks when one fails; nothing waits past `ends`."""

    def __init__(self, engine: SglangEngine, label: str, *, seconds: float) -> None:
        """`seconds`: for the update as a whole."""
        self.engine = engine
        self.label = label
        self.ends = time.monotonic() + seconds
        self.failures: list[str] = []
        for error in engine.identify_late().values():
            logger.warning("%s", error)
            self.failures.append(str(error))
        self.members: list[Member] = [member for member in engine.fleet.updatable() if member.identified]
        if not self.members:
            raise SyncFailed(
                f"weights {label}: no server can be updated: {engine.fleet.describe()}", retry=True
            )

    def begin_session(self) -> None:
        """Open a weight-update session on every server.

        One that a killed trainer or a broken update left open would be refused: it is ended first, and whether there
        was one does not matter.
        """

        async def end(member: Member) -> None:
            await member.client.post(END_WEIGHT_UPDATE, {}, deadline=30.0, phase="ending a session")

        self.gather(end, self.members, 30.0, "ending a session")
        self.post_all(BEGIN_WEIGHT_UPDATE, {}, phase="begin of the weight update")

    def end_session(self) -> None:
        """Close it: the servers bring what they were given into its final form."""
        self.post_all(END_WEIGHT_UPDATE, {}, phase="end of the weight update")

    def left(self) -> float:
        """Seconds until the update's deadline; at least a moment."""
        return max(0.1, self.ends - time.monotonic())

    def post_all(
        self,
        path: str,
        body: dict[str, Any] | Callable[[Member], dict[str, Any]],
        *,
        phase: str,
        seconds: float | None = None,
    ) -> dict[Member, Any]:
        """POST to every member at once; those that fail are dropped. Returns the answers of the others."""
        limit = min(self.left(), seconds if seconds is not None else _STEP_SECONDS)

        async def one(member: Member) -> Any:
            content = body(member) if callable(body) else body
            answer = await member.client.post(path, content, deadline=limit, phase=phase)
            if (why := refusal(answer)) is not None:
                raise ServerFault(member.url, phase, f"{path}: {why}")
            return answer

        return self._keep(self.gather(one, self.members, limit, phase))

    def gather(
        self,
        work: Callable[[Member], Any],
        members: Sequence[Member],
        limit: float,
        phase: str,
    ) -> dict[Member, Any]:
        """`await work(member)` for all members at once: results, or the ServerError in their place."""

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*(work(member) for member in members), return_exceptions=True)

        found = dict(zip(members, self.engine.run(all_of_them(), limit, phase)))
        for result in found.values():
            if isinstance(result, BaseException) and not isinstance(result, ServerError):
                raise result
        return found

    def _keep(self, results: dict[Member, Any]) -> dict[Member, Any]:
        kept = {}
        for member, result in results.items():
            if isinstance(result, ServerError):
                self.drop(member, result)
            else:
                kept[member] = result
        return kept

    def drop(self, member: Member, error: Exception) -> None:
        """Go on without a server."""
        self.failures.append(str(error))
        self.members.remove(member)
        self.engine.on_loop(lambda: self.engine.fleet.handle(member, UpdateFailed(str(error))))

    @contextmanager
    def paused(self, *, go_on: bool = True) -> Iterator[None]:
        """Generation is paused, requests are aborted and caches are flushed; goes on afterwards, verified.

        Args: go_on: False leaves the servers paused and `updating`, for whoever has more to do before they go on.
        """
        handle = self.engine.fleet.handle
        self.engine.on_loop(lambda: [handle(member, UpdateBegan()) for member in self.members])
        try:
            limit = min(self.left(), _STEP_SECONDS)
            work = functools.partial(pause_and_flush, seconds=limit, wake=go_on)
            self._keep(self.gather(work, self.members, limit, "pausing generation"))
            self.require_members()
            yield
            self._check_versions()
            if go_on:
                body = continue_body(empty_cache=True)
                self.post_all(CONTINUE_GENERATION, body, phase="continuing generation")
                self.require_members()
        except BaseException as error:
            for member in list(self.members):
                self.drop(
                    member, error if isinstance(error, Exception) else SyncFailed(repr(error), retry=False)
                )
            raise
        if go_on:
            self.engine.on_loop(self.done)

    def done(self) -> None:
        """The servers that are left take work again; call in the event loop."""
        # All in one turn of the loop: a probe in between would find weights that are not the wanted ones.
        fleet = self.engine.fleet
        fleet.wanted = self.label
        for member in self.members:
            fleet.handle(member, UpdateDone(self.label))

    def _check_versions(self) -> None:
        limit = min(self.left(), _STEP_SECONDS)

        async def one(member: Member) -> None:
            await check_version(member, self.label, deadline=limit, phase="checking the version")

        self._keep(self.gather(one, self.members, limit, "checking versions"))
        self.require_members()

    def require_members(self) -> None:
        """Raises SyncFailed when no server is left."""
        if not self.members:
            raise SyncFailed(
                f"weights {self.label}: no server took them: {'; '.join(self.failures)}", retry=True
            )


async def pause_and_flush(member: Member, seconds: float, *, wake: bool = True) -> None:
    """Pause one server: what runs there is aborted, its cache is empty.

    Args: wake: let it go on first; not one that has given its cache away, which could not.

    Raises ServerError, at the latest after `seconds`.
    """
    client, phase = member.client, "pausing generation"
    ends = time.monotonic() + seconds
    # One that stands still, as `serve` holds a restarted one, would not end what it has half done, and keep its cache.
    if wake:
        await client.post(CONTINUE_GENERATION, continue_body(), deadline=seconds, phase=phase)
    await client.post(PAUSE_GENERATION, pause_body(), deadline=ends - time.monotonic(), phase=phase)
    give_up = ends - seconds + min(seconds / 2, _FLUSH_SECONDS)
    await flush(member, ends=ends, give_up=give_up, phase="flushing the cache")


async def flush(member: Member, *, ends: float, give_up: float, phase: str) -> None:
    """Empty a paused server's cache, which it refuses while an aborted batch, or a health check, is on its way through.

    Args: ends, give_up: of the whole, and of trying it again, by time.monotonic().

    Raises ServerError.
    """
    while True:
        try:
            await member.client.post(FLUSH_CACHE, {}, deadline=ends - time.monotonic(), phase=phase)
            return
        except (ServerFault, ServerRefused):
            if time.monotonic() > give_up:
                raise
        await asyncio.sleep(_FLUSH_PAUSE)


async def check_version(member: Member, label: str, *, deadline: float, phase: str) -> None:
    """Raises StaleServer when a server does not hold the weights of that name; ServerError when it does not say."""
    version = weight_version(await member.client.get(MODEL_INFO, deadline=deadline, phase=phase))
    if version != label:
        raise StaleServer(member.url, phase, f"holds weights {version!r} after an update to {label!r}")


def on_cpu(members: Sequence[Member]) -> bool:
    """Whether all these servers compute on CPUs."""
    return all(member.device == "cpu" for member in members)
