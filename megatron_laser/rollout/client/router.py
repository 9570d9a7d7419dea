"""A router in front of the servers: it gets a request's first try, and nothing depends on it.

Which server holds a request is the router's secret. So whatever goes wrong with a first try, the next one goes
straight to a server that is known to hold the wanted weights.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from megatron_laser.rollout.client.errors import ServerError, ServerGone, ServerTimeout
from megatron_laser.rollout.client.event_loop import cancelling
from megatron_laser.rollout.client.http import ServerClient
from megatron_laser.rollout.sglang_api import ROUTER_WORKERS

logger = logging.getLogger(__name__)

_REST = 30.0  # seconds without the router after it failed
_PROBE_EVERY = 2.0
_MISSES = 2  # probes in a row without an answer: it hangs


class Router:
    """One router. Create and use inside one event loop."""

    def __init__(self, client: ServerClient, *, probe_deadline: float) -> None:
        """Args: probe_deadline: seconds for the answer to a probe."""
        self._client = client
        self._probe_deadline = probe_deadline
        self._rests_until = 0.0
        self._running: set[asyncio.Task[Any]] = set()
        self._monitor = asyncio.create_task(self._watch())

    @property
    def url(self) -> str:
        """Its address."""
        return self._client.url

    def takes_work(self) -> bool:
        """Whether a first try should go through it."""
        return time.monotonic() >= self._rests_until

    async def request(
        self, body: dict[str, Any], *, deadline: float, phase: str, patient: bool = False
    ) -> Any:
        """The answer to `GENERATE` of whichever server the router chooses.

        patient: an answer that is late says nothing of the router.

        Raises ServerError; ServerGone also when `cancel_requests` was called meanwhile.
        """
        phase = f"{phase} through the router"
        task = asyncio.ensure_future(self._client.request(body, deadline=deadline, phase=phase))
        self._running.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if task.cancelled() and not cancelling():
                raise ServerGone(self._client.url, phase, "it or a server behind it hangs") from None
            task.cancel()
            raise
        except (ServerGone, ServerTimeout) as error:
            if not (patient and isinstance(error, ServerTimeout)):
                self._rest(str(error))
            raise
        finally:
            self._running.discard(task)

    def cancel_requests(self) -> None:
        """End all requests that are open through it: one of its servers hangs, and nobody knows what that one has."""
        for task in list(self._running):
            task.cancel()

    def _rest(self, reason: str) -> None:
        if self.takes_work():
            logger.warning("%s; requests go to the servers for %g s", reason, _REST)
        self._rests_until = time.monotonic() + _REST

    async def _watch(self) -> None:
        """A router that has died breaks its connections; one that hangs is only found by asking it."""
        misses = 0
        while True:
            await asyncio.sleep(_PROBE_EVERY)
            try:
                await self._client.get(
                    ROUTER_WORKERS, deadline=self._probe_deadline, phase="probe of the router"
                )
                misses = 0
            except ServerTimeout as error:
                misses += 1
                if misses >= _MISSES:
                    self._rest(str(error))
                    self.cancel_requests()
            except ServerError as error:
                logger.debug("%s", error)  # a proxy of another kind, or gone: requests say so themselves
