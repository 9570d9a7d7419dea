"""HTTP servers in threads of the test: what all fake servers listen with. Standard library only."""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any] | Any
"""A status and a body, or a body with status 200. A body is text, or a JSON value."""
Handle = Callable[[BaseHTTPRequestHandler, str, dict[str, Any]], None]
"""Called with the handler, which has the headers, the path, and the JSON body."""


class HttpServer(ThreadingHTTPServer):
    """Listens at once; `handle` answers every GET and POST, by `respond` for example."""

    daemon_threads = True

    def __init__(
        self, handle: Handle, host: str = "127.0.0.1", port: int = 0, *, keep_alive: bool = False
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1" if keep_alive else "HTTP/1.0"

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                handle(self, self.path, json.loads(self.rfile.read(length) or b"{}"))

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                return None

        super().__init__((host, port), Handler)
        self.url = f"http://{host}:{self.server_port}"

    def start(self) -> None:
        """Serve in a thread, until `stop`."""
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, *request: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away
            super().handle_error(*request)


def respond(handler: BaseHTTPRequestHandler, status: int, body: Any, *, stated: int | None = None) -> None:
    """Bytes and text are sent as they are, the rest as JSON. `stated`: the length that is claimed instead."""
    data = (
        body
        if isinstance(body, bytes)
        else body.encode()
        if isinstance(body, str)
        else json.dumps(body).encode()
    )
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data) if stated is None else stated))
    handler.end_headers()
    handler.wfile.write(data)
    handler.wfile.flush()


@contextlib.contextmanager
def answering(answer: Callable[[str, dict[str, Any]], Answer]) -> Iterator[str]:
    """The address of a server on which `answer(path, body)` says what comes back."""

    def handle(handler: BaseHTTPRequestHandler, path: str, body: dict[str, Any]) -> None:
        reply = answer(path, body)
        status, reply = reply if isinstance(reply, tuple) else (200, reply)
        with contextlib.suppress(ConnectionError):  # a client that has heard enough
            respond(handler, status, reply)

    server = HttpServer(handle)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()
