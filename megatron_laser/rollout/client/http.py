"""HTTP to one SGLang server: every call has a deadline, and every failure names server and phase."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import aiohttp
import orjson

from megatron_laser.rollout.answer_arrays import MIN_BYTES, read_answer
from megatron_laser.rollout.client.errors import (
    OutOfFiles,
    ServerBusy,
    ServerFault,
    ServerGone,
    ServerRefused,
    ServerTimeout,
    UnexpectedAnswer,
)
from megatron_laser.rollout.sglang_api import GENERATE, PROSE

T = TypeVar("T")

_CONNECT_SECONDS = 10.0
_BUSY = (408, 429, 503)  # a full queue, a router without workers, a server that starts: worth another try
_READERS = (
    2  # threads that read long answers: while one has the interpreter's lock, the other is inside NumPy
)
_SHOWN = 500  # characters of a server's own words


class ServerClient:
    """One server's address. Owns no connection: sessions belong to the event loop that uses them."""

    def __init__(self, url: str, sessions: Sessions) -> None:
        self.url = url
        self._sessions = sessions

    async def get(self, path: str, *, deadline: float, phase: str) -> Any:
        """The JSON behind GET `path`."""
        return await self._call("GET", path, None, deadline, phase, self._sessions.control)

    async def post(self, path: str, body: dict[str, Any], *, deadline: float, phase: str) -> Any:
        """The JSON behind a control call. It is never repeated: nobody knows how far a broken one came."""
        return await self._call("POST", path, body, deadline, phase, self._sessions.control)

    async def request(self, body: dict[str, Any], *, deadline: float, phase: str) -> Any:
        """The JSON behind `GENERATE`, as `read_answer` gives it, over a kept connection."""
        return await self._call("POST", GENERATE, body, deadline, phase, self._sessions.data)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """See `Sessions.in_thread`."""
        return await self._sessions.in_thread(work)

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        deadline: float,
        phase: str,
        session: aiohttp.ClientSession,
    ) -> Any:
        data = None if body is None else orjson.dumps(body)
        timeout = aiohttp.ClientTimeout(total=max(0.01, deadline), sock_connect=_CONNECT_SECONDS)
        try:
            async with session.request(method, self.url + path, data=data, timeout=timeout) as response:
                raw = await response.read()
                status = response.status
        except TimeoutError as error:
            raise ServerTimeout(self.url, phase, f"no answer to {path} within {deadline:.3g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise OutOfFiles(
                    self.url,
                    phase,
                    f"{path}: this process has too many open files (ulimit -n); lower "
                    "rollout.max_concurrency_per_server",
                ) from error
            raise ServerGone(
                self.url, phase, f"{path}: {error or type(error).__name__}; is the server up?"
            ) from error
        if status in _BUSY:
            raise ServerBusy(self.url, phase, f"{path} answered {status}: {_words(raw)}")
        if status >= 500:
            raise ServerFault(self.url, phase, f"{path} answered {status}: {_words(raw)}")
        if status >= 400:
            words = f"{path} answered {status}: {_words(raw)}{_hint(status)}"
            raise ServerRefused(self.url, phase, words, status)
        if not raw:
            return None
        try:
            if len(raw) < MIN_BYTES:
                return orjson.loads(raw)
            return await self._sessions.in_thread(lambda: read_answer(raw))
        except orjson.JSONDecodeError as error:
            if path in PROSE:
                return raw.decode(errors="replace")
            raise UnexpectedAnswer(
                self.url,
                phase,
                f"{path} answered {len(raw)} bytes that are not JSON ({error}): {_words(raw)}",
            ) from error


class Sessions:
    """The connections of one event loop: kept ones for generation, fresh ones for control.

    A kept connection may have been closed by the server just as it is used again; a generation is then simply
    repeated, but a control call must not fail for that. Long answers are read in threads beside the loop, which would
    answer nobody else meanwhile.
    """

    def __init__(self, api_key: str | None) -> None:
        """Create inside the event loop that will use it."""
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        # No proxies from the environment: servers are on loopback or a private network.
        # Two seconds: servers that others started end idle connections after five, later than they should when busy.
        self.data = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0), headers=headers, trust_env=False
        )
        self.control = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True), headers=headers, trust_env=False
        )

        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="rollout answers")

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What `work` returns, which runs beside the loop. Given up, it runs to its end, and nobody hears of it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Close all connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(self.data.close(), self.control.close())


def _words(raw: bytes) -> str:
    return raw.decode(errors="replace").strip()[:_SHOWN] or "(nothing)"


def _hint(status: int) -> str:
    if status in (401, 403):
        return "; set the variable that rollout.sglang.api_key_env names to the servers' key"
    return ""
