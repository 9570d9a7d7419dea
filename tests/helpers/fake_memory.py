"""Servers whose memory comes and goes, in this process: they end, as SGLang's scheduler does, when order is not kept.

a release of a tag that is away, a resume of a tag that is there, a release while generation is not paused
or a request still runs, weights sent while they are away, or going on while anything is away: the server is dead
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from helpers.fake_server import ServerState
from helpers.plain_http import answering

CONTROL = ("/pause_generation", "/flush_cache", "/continue_generation")
TAGS = {"kv_cache", "weights", "cuda_graph"}


@dataclass(eq=False)
class FakeMemory(ServerState):
    """One server.

    log: what was asked of it, in order, probes left out. busy: flushes that are refused before one is taken. broken:
    paths that answer 500.
    """

    url: str = ""
    device: str = "cpu"
    tensor: int = 1
    vocab_size: int = 28
    held: set[str] = field(default_factory=lambda: set(TAGS))
    session: bool = False
    busy: int = 0
    broken: set[str] = field(default_factory=set)
    died_of: str = ""
    log: list[str] = field(default_factory=list)
    received: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.info = {
            "tp_size": self.tensor,
            "dtype": "float32",
            "device": self.device,
            "vocab_size": self.vocab_size,
        }

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, JSON) of one request."""
        if path == "/v1/loads":
            return 200, []
        if path in ("/model_info", "/server_info"):
            return 200, self.answer(path, body)
        with self.lock:
            if self.died_of:
                return 500, {"message": self.died_of}
            tags = body.get("tags", [])
            self.log.append(" ".join([path.removeprefix("/"), *tags]))
            if path in self.broken:
                return 500, {"message": "told to fail"}
            return self._control(path, body, set(tags))

    def _control(self, path: str, body: dict[str, Any], tags: set[str]) -> tuple[int, Any]:
        if path == "/flush_cache":
            if self.busy:
                self.busy -= 1
                return 400, {"message": "there are running requests"}
        elif path == "/release_memory_occupation":
            if not self.paused or self.busy or not tags <= self.held:
                return self._die(f"release {sorted(tags)}: holds {sorted(self.held)}, paused {self.paused}")
            self.held -= tags
        elif path == "/resume_memory_occupation":
            if tags & self.held:
                return self._die(f"resume {sorted(tags)}: holds {sorted(self.held)}")
            self.held |= tags
        elif path == "/begin_weight_update":
            if self.session:
                return 200, {"success": False, "message": "a weight-update session is already open"}
            self.session = True
        elif path == "/end_weight_update":
            if not self.session:
                return 400, {"success": False, "message": "no weight-update session is open"}
            self.session = False
        elif path == "/update_weights_from_tensor":
            if not self.session or "weights" not in self.held:
                return self._die("weights were sent to nowhere")
            self.received.append(body)
            return 200, self.answer(path, body)
        elif path == "/continue_generation" and self.held != TAGS:
            return self._die(f"goes on with {sorted(self.held)} only")
        else:
            found = self.answer(path, body)
            return (404, {"message": f"no {path}"}) if found is None else (200, found)
        return 200, {"success": True}

    def _die(self, reason: str) -> tuple[int, Any]:
        self.died_of = reason
        return 500, {"message": reason}


@contextlib.contextmanager
def running(*servers: FakeMemory) -> Iterator[None]:
    """Serve all of them on loopback; sets their `url`."""
    with contextlib.ExitStack() as stack:
        for fake in servers:
            fake.url = stack.enter_context(answering(fake.reply))
        yield
