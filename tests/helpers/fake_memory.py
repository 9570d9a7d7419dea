"""Servers whose memory comes and goes, in this process: they end, as SGLang's scheduler does, when order is not kept.

a release of a tag that is away, a resume of a tag that is there, a release while generation is not paused
or a request still runs, weights sent while they are away, or going on while anything is away: the server is dead
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTROL = ("/pause_generation", "/flush_cache", "/continue_generation")
TAGS = {"kv_cache", "weights", "cuda_graph"}


@dataclass
class FakeMemory:
    """One server.

    log: what was asked of it, in order, probes left out. busy: flushes that are refused before one is taken. broken:
    paths that answer 500. sums: checksums of the weights that it says to hold.
    """

    url: str = ""
    device: str = "cpu"
    tensor: int = 1
    vocab_size: int = 28
    held: set[str] = field(default_factory=lambda: set(TAGS))
    paused: bool = False
    session: bool = False
    version: str = "default"
    busy: int = 0
    broken: set[str] = field(default_factory=set)
    died_of: str = ""
    log: list[str] = field(default_factory=list)
    received: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, JSON) of one request."""
        if path == "/v1/loads":
            return 200, []
        if path == "/model_info":
            return 200, {"weight_version": self.version, "is_generation": True, "model_path": "m"}
        if path == "/server_info":
            return 200, {
                "version": "0.5.23",
                "tp_size": self.tensor,
                "dtype": "float32",
                "device": self.device,
                "vocab_size": self.vocab_size,
            }
        with self.lock:
            if self.died_of:
                return 500, {"message": self.died_of}
            tags = body.get("tags", [])
            self.log.append(" ".join([path.removeprefix("/"), *tags]))
            if path in self.broken:
                return 500, {"message": "told to fail"}
            return self._control(path, body, set(tags))

    def _control(self, path: str, body: dict[str, Any], tags: set[str]) -> tuple[int, Any]:
        if path == "/pause_generation":
            self.paused = True
        elif path == "/flush_cache":
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
            self.version = body.get("weight_version", self.version)
        elif path == "/weights_checker":
            rank = {"checksums": self.sums, "per_gpu_checksum": str(sorted(self.sums.items()))}
            ranks = [rank] * self.tensor
            return 200, {"success": True, "ranks": ranks}
        elif path == "/continue_generation":
            if self.held != TAGS:
                return self._die(f"goes on with {sorted(self.held)} only")
            self.paused = False
        else:
            return 404, {"message": f"no {path}"}
        return 200, {"success": True}

    def _die(self, reason: str) -> tuple[int, Any]:
        self.died_of = reason
        return 500, {"message": reason}


@contextlib.contextmanager
def running(*servers: FakeMemory) -> Iterator[None]:
    """Serve all of them on loopback; sets their `url`."""
    started = []
    try:
        for fake in servers:
            server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
            started.append(server)
            fake.url = f"http://127.0.0.1:{server.server_port}"
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield
    finally:
        for server in started:
            server.shutdown()
            server.server_close()


def _handler(fake: FakeMemory) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            status, reply = fake.answer(self.path, body)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return None

    return Handler
