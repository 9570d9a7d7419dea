"""How many requests may be open at once: so many for each server that takes work."""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from megatron_laser.rollout.client.fleet import Fleet
from megatron_laser.rollout.open_files import connections_that_fit

logger = logging.getLogger(__name__)


class Slots:
    """`async with slots`: waits until a request may be sent; in the order of asking.

    The limit follows the fleet: a server that joins or comes back brings its share, one that dies takes it along, and
    then nobody new is let in until the others' requests are within what is left. Use inside the fleet's event loop.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._open = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._asked, self._fit = 0, 0  # the largest limit so far, and what of it open files allow
        fleet.on_change = self._let_in

    @property
    def limit(self) -> int:
        """Requests at once. With no server one server's share: whoever is let in finds out what to wait for."""
        wanted = self._fleet.per_server * max(1, len(self._fleet.available()))
        if wanted > self._asked:
            self._asked, self._fit = wanted, connections_that_fit(wanted)
            if self._fit < wanted:
                logger.warning(
                    "rollout.max_concurrency_per_server %d: the limit of open files (ulimit -Hn) allows %d requests at "
                    "once and not %d",
                    *(self._fleet.per_server, self._fit, wanted),
                )
        return min(wanted, self._fit)

    async def __aenter__(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    async def __aexit__(self, *error: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._open -= 1
        self._let_in()

    def _let_in(self) -> None:
        if not self._waiting:
            return
        free = self.limit - self._open
        while self._waiting and free > 0:
            turn = self._waiting.popleft()
            if not turn.done():  # else it was given up
                turn.set_result(None)
                self._open += 1
                free -= 1
