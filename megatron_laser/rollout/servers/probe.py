"""Small questions to a server over HTTP, each with a deadline. Nothing here raises for a server that is not well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_laser.rollout.sglang_api import (
    CONTINUE_GENERATION,
    FREEZE_GC,
    MODEL_INFO,
    PAUSE_GENERATION,
    READY,
    ROUTER_WORKERS,
    SERVER_INFO,
    add_worker_body,
    continue_body,
    pause_body,
    router_workers,
    server_facts,
    weight_version,
)

_QUICK = 10.0  # seconds for an answer that needs no scheduler


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer to a probe through its scheduler.

    Attributes:
        sglang_version: of the package.
        weight_version: of the weights that it holds now.
    """

    sglang_version: str
    weight_version: str


class Prober:
    """Asks servers; one per event loop."""

    def __init__(self, api_key: str | None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}
        # a connection of its own each: one that was open to a killed process would fail the first probe
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        self._session = aiohttp.ClientSession(headers=headers, connector=connector, trust_env=False)

    async def close(self) -> None:
        """Close the session."""
        await self._session.close()

    async def ask(self, url: str, deadline: float) -> Answer | None:
        """Whether the server's scheduler answers within `deadline` seconds, paused or not; None: it does not.

        SGLang's own health check would not do: it generates a token, and answers 503 while generation is paused.
        """
        server = await self._json("GET", url + SERVER_INFO, deadline)
        info = None if server is None else await self._json("GET", url + MODEL_INFO, _QUICK)
        if server is None or info is None:
            return None
        facts = server_facts(info, server)
        return Answer(facts.sglang_version, facts.weight_version) if facts.sglang_version else None

    async def takes_requests(self, url: str) -> bool | None:
        """Whether the server has finished its own start-up and is not paused; None: it does not say.

        The HTTP process answers that by itself, whatever its scheduler does.
        """
        try:
            async with self._session.get(url + READY, timeout=aiohttp.ClientTimeout(total=_QUICK)) as reply:
                return {200: True, 503: False}.get(reply.status)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def hold(self, url: str, initial_version: str) -> bool:
        """Let requests wait until somebody has sent the server weights and continued it; True if it does that now.

        A run may have done so since the server was last asked. The pause came after its continuing then, and nobody
        else would end it.
        """
        if await self._json("POST", url + PAUSE_GENERATION, _QUICK, pause_body(keep_requests=True)) is None:
            return False
        info = await self._json("GET", url + MODEL_INFO, _QUICK)
        if info is None or weight_version(info) == initial_version:
            return True
        await self._json("POST", url + CONTINUE_GENERATION, _QUICK, continue_body())
        return False

    async def freeze_gc(self, url: str) -> bool:
        """Let a server's garbage collector forget what it holds after its start; True if it has.

        SGLang asks itself for that once its warm-up is over. Without a warm-up it asks before its port is open, and
        then each collection goes through all that was imported: 0.4 s in every flush of the cache, on a CPU.
        """
        timeout = aiohttp.ClientTimeout(total=_QUICK)
        try:
            async with self._session.post(url + FREEZE_GC, timeout=timeout) as reply:
                return reply.status < 300
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def router_workers(self, url: str) -> dict[str, bool] | None:
        """A router's workers: {address: healthy}; None: it does not answer."""
        return router_workers(await self._json("GET", url + ROUTER_WORKERS, _QUICK))

    async def add_worker(self, url: str, worker: str, api_key: str | None) -> bool:
        """Tell a router of a worker; it checks and adds it later. True if it has taken the order."""
        body = add_worker_body(worker, api_key)
        return await self._json("POST", url + ROUTER_WORKERS, _QUICK, body) is not None

    async def _json(
        self, method: str, url: str, deadline: float, body: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """The object in a successful reply, else None."""
        timeout = aiohttp.ClientTimeout(total=deadline)
        try:
            async with self._session.request(method, url, json=body, timeout=timeout) as reply:
                content = await reply.json(content_type=None) if reply.status < 300 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None
