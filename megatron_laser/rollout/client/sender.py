"""One request to one server, or through the router, and what it says of the server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_laser.rollout.client.errors import (
    ServerBusy,
    ServerError,
    ServerFault,
    ServerGone,
    ServerMismatch,
    ServerRefused,
    ServerTimeout,
    StaleServer,
)
from megatron_laser.rollout.client.event_loop import cancelling
from megatron_laser.rollout.client.fleet import Fleet, Member
from megatron_laser.rollout.client.health import Answered
from megatron_laser.rollout.client.http import ServerClient
from megatron_laser.rollout.client.responses import RequestStats, Weights
from megatron_laser.rollout.client.router import Router
from megatron_laser.rollout.routed_experts import WrongExperts, has_routing
from megatron_laser.rollout.sglang_api import ABORT_REQUEST, Reply, ScoreReply, abort_body, abort_message

logger = logging.getLogger(__name__)

R = TypeVar("R", Reply, ScoreReply)

_ABORT_SECONDS = 10.0
_BUSY_KEPT = 10_000


class RequestSender:
    """Sends requests to members of `fleet`, or through `router`; tells the fleet how they fared."""

    def __init__(self, fleet: Fleet, stats: RequestStats, router: Router | None) -> None:
        self._fleet = fleet
        self._stats = stats
        self._router = router
        # When each server had requests of ours: (url, start, end) by `time.perf_counter`, for the run's timeline.
        self.busy: deque[tuple[str, float, float]] = deque(maxlen=_BUSY_KEPT)
        self._busy_since: dict[str, float] = {}
        if router is not None:
            fleet.on_hang = router.cancel_requests

    async def ask(
        self,
        member: Member,
        body: dict[str, Any],
        parse: Callable[[Any], R],
        *,
        weights: Weights,
        seconds: float,
        phase: str,
        direct: bool,
        patient: bool = False,
    ) -> R:
        """POST `GENERATE`; ends when the server dies.

        Args:
            parse: called in a thread beside the loop where the answer holds experts or sets; raises ValueError,
                LookupError or TypeError for what is no answer.
            direct: to `member` itself, and not through the router, which might choose what failed before.
            patient: an answer that is late says nothing of the server, whose probes do.

        Raises:
            ServerMismatch: its answer has experts that this model cannot have.
            ServerError: as the request failed, or its answer is none, or is of other weights.
        """
        self._stats.requests += 1
        routed = None if direct or self._router is None or not self._router.takes_work() else self._router
        if routed is None:
            answer = await self._send(member, body, seconds, phase, patient)
        else:
            # Given up, it ends by itself: the router leaves a server when its own client leaves.
            answer = await routed.request(body, deadline=seconds, phase=phase, patient=patient)
        url = member.url if routed is None else routed.url
        try:
            refused = abort_message(answer)
            if refused is not None:
                raise ServerRefused(url, phase, refused)
            # Two megabytes and more of experts for a long response, or as many ids of sets.
            if has_routing(answer) or "return_sampling_mask" in body:
                reply = await member.client.in_thread(lambda: parse(answer))
            else:
                reply = parse(answer)
        except WrongExperts as error:
            raise ServerMismatch(url, phase, f"its answer has {error}") from error
        except (LookupError, TypeError, ValueError) as error:
            fault = ServerFault(url, phase, f"its answer has {error}")
            if routed is None:
                self._fleet.failed(member, fault)
            raise fault from error
        wrong = [version for version in reply.versions if weights.label not in (None, version)]
        if wrong:
            self._stats.stale_replies += 1
            if routed is None:
                self._fleet.handle(member, Answered(wrong[0]))
                await self._fleet.ask_again(member)  # one odd answer is no reason for a weight sync
            raise StaleServer(
                url, phase, f"answered with weights {wrong[0]!r} instead of {weights.label!r}; dropped"
            )
        return reply

    async def abort(self, member: Member, rid: str) -> None:
        """End a request that `member` may have, or, behind a router, any server."""
        holders = [member] if self._router is None else [member, *self._fleet.available()]
        await asyncio.gather(*(self._abort(client, rid) for client in {each.client for each in holders}))

    async def _send(
        self, member: Member, body: dict[str, Any], seconds: float, phase: str, patient: bool
    ) -> Any:
        task = asyncio.ensure_future(member.client.request(body, deadline=seconds, phase=phase))
        if not member.running:
            self._busy_since[member.url] = time.perf_counter()
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
            late = patient and isinstance(error, ServerTimeout)
            if not late and not isinstance(error, ServerRefused | ServerBusy):
                self._fleet.failed(member, error)
            if not error.gone:
                await self._abort(member.client, body["rid"])
            raise
        finally:
            member.running.discard(task)
            if not member.running and (since := self._busy_since.pop(member.url, None)) is not None:
                self.busy.append((member.url, since, time.perf_counter()))
        self._fleet.succeeded(member)
        return answer

    async def _abort(self, client: ServerClient, rid: str) -> None:
        """Best effort: a request that is not aborted ends by itself, and its answer is dropped."""
        try:
            await client.post(ABORT_REQUEST, abort_body(rid), deadline=_ABORT_SECONDS, phase="abort")
        except ServerError as error:
            logger.debug("%s", error)
