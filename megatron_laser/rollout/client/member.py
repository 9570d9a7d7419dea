"""One server of the fleet, with what is known of it and what runs on it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

from megatron_laser.rollout.client.errors import ServerError
from megatron_laser.rollout.client.health import Health, State
from megatron_laser.rollout.client.http import ServerClient
from megatron_laser.rollout.endpoints import ServerEndpoint


@dataclass(eq=False)
class Member:
    """One server as the fleet sees it.

    endpoint: what is published of it. tensor, device: its tensor-parallel size and "cpu" or "cuda", once it has been
    identified (device None: not yet). takes_seeds: it samples by a request's seed. running: its open requests; they
    end when it dies.
    """

    client: ServerClient
    health: Health
    endpoint: ServerEndpoint
    start: int = 0
    tensor: int = 1
    device: str | None = None
    takes_seeds: bool = False
    running: set[asyncio.Task[Any]] = field(default_factory=set)
    trouble: ServerError | None = None  # the last probe's
    probing: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return self.client.url

    @property
    def load(self) -> float:
        """Open requests for each of its GPUs."""
        return len(self.running) / self.tensor


def level_of(states: set[State]) -> int:
    """How loudly a change between two states is told: every step has an update, and no update is news."""
    if states <= {State.HEALTHY, State.UPDATING}:
        return logging.DEBUG
    quiet = {State.HEALTHY, State.UPDATING, State.STARTING, State.DRAINING}
    return logging.INFO if states <= quiet else logging.WARNING
