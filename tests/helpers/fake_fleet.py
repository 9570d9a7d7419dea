"""A fleet of SGLang servers in memory, for what is done to several of them at once: no sockets, no processes.

Only the HTTP is replaced: fleet and health are the real ones, and so is whatever a test sends to the servers.
"""

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from megatron_laser.rollout.client.errors import ServerError, ServerFault
from megatron_laser.rollout.client.fleet import Fleet, Member
from megatron_laser.rollout.client.health import Answered, Limits
from megatron_laser.rollout.endpoints import ServerEndpoint


class FakeServer:
    """A `ServerClient` and the server behind it.

    Attributes:
        log: (server's url, path) of every call to any server of the fleet, in order.
        fails: path -> what a call of it raises, or answers in place of the truth. An update begins with a
            /continue_generation, for a server that somebody else has paused: of one that runs it does not fail.
        sums: what /weights_checker answers.
        left: groups that it was told to leave.
        loads: called with the folder of a disk update before it counts.
    """

    def __init__(self, url: str, log: list[tuple[str, str]]) -> None:
        self.url = url
        self.log = log
        self.version = "default"
        self.paused = False
        self.running = False
        self.fails: dict[str, Any] = {}
        self.left: list[str] = []
        self.sums: dict[str, str] = {}
        self.loads: Callable[[str], None] = lambda folder: None
        self.deadlines: dict[str, float] = {}

    async def get(self, path: str, *, deadline: float, phase: str) -> Any:
        return self._answer(path, {}, deadline)

    async def post(self, path: str, body: dict[str, Any], *, deadline: float, phase: str) -> Any:
        return self._answer(path, body, deadline)

    def _answer(self, path: str, body: dict[str, Any], deadline: float) -> Any:
        assert deadline > 0
        self.log.append((self.url, path))
        self.deadlines[path] = deadline
        if path in self.fails and (path != "/continue_generation" or self.paused):
            failure = self.fails[path]
            if isinstance(failure, BaseException):
                raise failure
            return failure
        if path == "/pause_generation":
            self.paused, self.running = True, False
        elif path == "/continue_generation":
            self.paused = False
        elif path == "/flush_cache" and self.running:
            raise ServerFault(self.url, "flush", "requests run")
        elif path == "/update_weights_from_disk":
            assert self.paused, "weights changed under running requests"
            self.loads(body["model_path"])
            self.version = body["weight_version"]
        elif path == "/update_weights_from_distributed":
            self.version = body.get("weight_version", self.version)
        elif path == "/destroy_weights_update_group":
            self.left.append(body["group_name"])
        elif path == "/model_info":
            return {"weight_version": self.version}
        elif path == "/weights_checker":
            return {
                "ranks": [{"checksums": dict(self.sums), "per_gpu_checksum": str(sorted(self.sums.items()))}]
            }
        return {"success": True}


class FakeEngine:
    """What a weight update needs of a `SglangEngine`, over `count` servers that hold the weights of their folder."""

    def __init__(self, count: int, *, hang_deadline: float = 60.0) -> None:
        self.session = "run"
        self.log: list[tuple[str, str]] = []
        self.servers = [FakeServer(f"http://s{number}", self.log) for number in range(count)]
        endpoints = [ServerEndpoint(server.url) for server in self.servers]
        limits = Limits(start=60.0, update=60.0, silence=hang_deadline)
        self.fleet = Fleet(lambda: endpoints, None, limits=limits)  # type: ignore[arg-type]
        for member, server in zip(self.fleet.members, self.servers):
            member.client, member.device = server, "cpu"  # type: ignore[assignment]
            self.fleet.handle(member, Answered("default"))

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """For what is asked beside other work."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        return loop

    def label(self, version: int) -> str:
        return f"{self.session}-{version}"

    def run(self, work: Coroutine[Any, Any, Any], deadline: float, phase: str) -> Any:
        return asyncio.run(asyncio.wait_for(work, deadline + 30))

    def on_loop(self, call: Callable[[], Any]) -> Any:
        return call()

    def identify_late(self) -> dict[Member, ServerError]:
        """They fit, and compute on CPUs."""
        for member in self.fleet.late():
            member.device = "cpu"
        return {}

    def member(self, number: int) -> Member:
        return self.fleet.members[number]

    def calls(self, number: int) -> list[str]:
        """Paths of the calls to one server."""
        return [path for url, path in self.log if url == self.servers[number].url]
