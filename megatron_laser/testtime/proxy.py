"""An OpenAI-compatible proxy: samples k answers, scores them, votes, and returns the score beside the answer.

It binds to loopback unless an API key is set, answers every request within its deadline, and refuses what it cannot
do with the error bodies that OpenAI clients understand.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from megatron_laser.config.addresses import http_url
from megatron_laser.data import NO_OPTIONS, ChatOptions
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.engine_choice import EngineChoice, open_engine
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.rewards import GradingPool
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.testtime.answering import Answer, answer
from megatron_laser.testtime.chat_completion import completion, stream_events
from megatron_laser.testtime.chat_request import ChatRequest, RequestError, parse_chat_request
from megatron_laser.testtime.scoring import Scorer

logger = logging.getLogger(__name__)

_LARGEST_BODY = 4 * 2**20  # bytes
_WAITING = 64  # requests that wait for an engine; further ones are told to come back
_GRACE = 5.0  # seconds beyond a request's deadline for its engine to say so itself
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def run_proxy(
    model: ModelFolder, choice: EngineChoice, settings: ProxySettings, *, say: Callable[[str], None]
) -> None:
    """Open engines and graders and serve until SIGINT or SIGTERM.

    Raises TestTimeError, before anything is loaded, when the port is taken.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(listen(settings.host, settings.port))
        count = 1 if choice.in_process else settings.engines
        engines = [
            stack.enter_context(open_engine(choice, model, deadline=settings.deadline)) for _ in range(count)
        ]
        pool = stack.enter_context(GradingPool(workers=2))
        application = make_application(model, engines, pool, settings)
        port = listener.getsockname()[1]
        say(f"{settings.model_name}: {http_url(settings.host, port)}/v1 (k = {settings.k}); Ctrl-C ends it")
        web.run_app(application, sock=listener, print=None, access_log=None)


def make_application(
    model: ModelFolder, engines: list[RolloutEngine], pool: GradingPool, settings: ProxySettings
) -> web.Application:
    """The web application, for `run_proxy` and for tests. Each engine answers one request at a time."""
    proxy = _Proxy(model, engines, pool, settings)
    application = web.Application(client_max_size=_LARGEST_BODY, middlewares=[proxy.guard])
    application.router.add_get("/health", proxy.health)
    application.router.add_get("/v1/models", proxy.models)
    application.router.add_get("/v1/models/{name}", proxy.one_model)
    application.router.add_post("/v1/chat/completions", proxy.chat)
    return application


class _Proxy:
    """Handlers and the engines that are free."""

    def __init__(
        self, model: ModelFolder, engines: list[RolloutEngine], pool: GradingPool, settings: ProxySettings
    ) -> None:
        self._model = model
        self._pool = pool
        self._settings = settings
        self._started = int(time.time())
        self._free: asyncio.Queue[tuple[RolloutEngine, Scorer]] = asyncio.Queue()
        for engine in engines:
            self._free.put_nowait((engine, Scorer(engine, model)))
        self._waiting = 0
        self._running: set[asyncio.Task[Answer]] = set()

    @web.middleware
    async def guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """The API key, and every error as OpenAI's clients expect it."""
        try:
            if request.path != "/health":
                self._check_key(request)
            return await handler(request)
        except RequestError as error:
            return _error(error.status, str(error), error.parameter, error.code)
        except TestTimeError as error:
            return _error(400, str(error), None, "invalid_value")
        except web.HTTPRequestEntityTooLarge:
            return _error(413, f"the request has more than {_LARGEST_BODY} bytes", None, "too_large")
        except web.HTTPException as error:  # no such path or method
            return _error(error.status, f"{request.method} {request.path}: {error.reason}", None, "not_found")
        except TimeoutError as error:
            return _error(504, f"no answer within {self._settings.deadline:g} s: {error}", None, "timeout")
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("%s %s", request.method, request.path)
            return _error(500, "the server failed; its log says why", None, "internal_error")

    async def health(self, request: web.Request) -> web.Response:
        """200 while the process serves."""
        return web.json_response({"status": "ok", "waiting": self._waiting})

    async def models(self, request: web.Request) -> web.Response:
        """The one model."""
        return web.json_response({"object": "list", "data": [self._card()]})

    async def one_model(self, request: web.Request) -> web.Response:
        """Its card, or 404."""
        self._check_model(request.match_info["name"])
        return web.json_response(self._card())

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Sample, score, vote, answer."""
        try:
            body = json.loads(await request.text())
        except (ValueError, LookupError, RecursionError) as error:  # LookupError: an unknown charset
            raise RequestError(400, f"the body is not JSON: {error}", None, "invalid_json") from None
        chat = parse_chat_request(
            body,
            self._model,
            default_k=self._settings.k,
            max_k=self._settings.max_k,
            max_new_tokens=self._settings.max_new_tokens,
            apply_chat_template=self._settings.apply_chat_template,
            prompt_suffix=self._settings.prompt_suffix,
            options=self._settings.options,
        )
        self._check_model(chat.model)
        result = completion(self._settings.model_name, chat, await self._answer(chat))
        if not chat.stream:
            return web.json_response(result)
        # The vote needs all samples, so there is nothing to send before it; until then an error still has its status.
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        with contextlib.suppress(ConnectionResetError):  # the client has hung up meanwhile
            await reply.prepare(request)
            for event in stream_events(result, with_usage=chat.stream_usage):
                await reply.write(event)
            await reply.write_eof()
        return reply

    async def _answer(self, chat: ChatRequest) -> Answer:
        """One engine's answer; waits for a free one, but not in a queue without end."""
        ends = time.monotonic() + self._settings.deadline
        if self._waiting >= _WAITING:
            raise RequestError(429, f"{self._waiting} requests are waiting; try again later", None, "busy")
        self._waiting += 1
        try:
            engine, scorer = await asyncio.wait_for(self._free.get(), self._settings.deadline)
        finally:
            self._waiting -= 1

        async def work() -> Answer:
            try:
                return await asyncio.to_thread(
                    answer, engine, scorer, self._model, chat, self._pool, max(0.1, ends - time.monotonic())
                )
            finally:
                self._free.put_nowait((engine, scorer))

        # A client that hangs up cancels its handler; the engine's call goes on to its end or deadline, and only
        # then is the engine free again.
        task = asyncio.create_task(work())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # the engine keeps its deadline itself; the grace is for one that does not
        return await asyncio.wait_for(asyncio.shield(task), max(0.1, ends - time.monotonic()) + _GRACE)

    def _check_key(self, request: web.Request) -> None:
        if not self._settings.api_key:
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(_bytes(given), _bytes(self._settings.api_key)):
            raise RequestError(401, "the API key is missing or wrong", None, "invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._settings.model_name:
            raise RequestError(
                404,
                f"model {name!r} is not served; expected {self._settings.model_name!r}",
                "model",
                "model_not_found",
            )

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "megatron_laser",
        }


def _bytes(key: str) -> bytes:
    """A header and an environment variable keep bytes that are no UTF-8 as surrogates."""
    return key.encode("utf-8", "surrogateescape")


def _error(status: int, message: str, parameter: str | None, code: str) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "1"} if status == 429 else None
    body = {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
    return web.json_response(body, status=status, headers=headers)


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """
    Attributes:
        model_name: what clients must name. host, port: where to listen.
        api_key: that clients must send; None only on loopback.
        k: answers sampled where a request names no number. max_k: the most it may ask for.
        max_new_tokens: longest answer; a request may ask for less.
        deadline: seconds for one request, waiting included.
        engines: requests at a time with servers; in this process it is one.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8100
    api_key: str | None = None
    k: int = 8
    max_k: int = 64
    max_new_tokens: int = 8192
    apply_chat_template: bool = True
    prompt_suffix: str = ""
    options: ChatOptions = NO_OPTIONS
    deadline: float = 600.0
    engines: int = 8

    def __post_init__(self) -> None:
        """Refuse what would be unsafe or cannot work."""
        if not self.api_key and not _is_loopback(self.host):
            raise TestTimeError(
                f"--host {self.host} can be reached from other machines: set the environment variable "
                "MEGATRON_LASER_PROXY_KEY to a key that clients must send, or listen on 127.0.0.1"
            )
        if not 1 <= self.k <= self.max_k:
            raise TestTimeError(f"--k {self.k}: expected 1 to --max-k {self.max_k}")
        if not 0 <= self.port < 65536:
            raise TestTimeError(f"--port {self.port}: expected 0 to 65535")
        if self.max_new_tokens < 1:
            raise TestTimeError(f"--max-new-tokens {self.max_new_tokens}: expected 1 or more")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: a free one. Raises TestTimeError when it cannot be had."""
    host = host.strip("[]")  # as in an address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise TestTimeError(
            f"cannot listen on --host {host} --port {port}: {error.strerror or error}"
        ) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
