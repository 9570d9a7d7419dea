"""The viewer over HTTP for one person's browser: on the loopback interface, behind a token, reading only.

A page that a browser has open elsewhere reaches servers on the loopback interface too. So the data needs the token,
which other pages do not have, and a request has to name this machine as its host: a foreign name that was made to
point here (DNS rebinding) is refused.
"""

from __future__ import annotations

import gzip
import hmac
import ipaddress
import logging
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import orjson

from megatron_laser.viewer.api import NotThere, Viewer, ViewError

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8650
_TRIES = 20  # ports after the default one
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SOCKET_SECONDS = 30.0  # for a request that is sent slowly, or an answer that nobody takes
_WORTH_PACKING = 1400  # bytes
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".woff": "font/woff",
}
_HEADERS = {
    # Nothing from elsewhere. Styles in elements: formulas are set with them.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the token is in the page's address
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def web_folder() -> Path:
    """The page's files."""
    return Path(str(resources.files("megatron_laser"))) / "viewer" / "web"


class ViewerServer:
    """Serves a viewer until `close`."""

    def __init__(
        self,
        viewer: Viewer,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        token: str | None = None,
        web: Path | None = None,
    ) -> None:
        """Bind it.

        Args:
            port: 0: any that is free; None: the default one or, where it is taken, one of the next.
            token: what requests for data have to show; None: a random one. web: the page's files.

        Raises:
            ViewError: the port is taken, or the host is none of this machine's.
        """
        self.token = token or secrets.token_urlsafe(24)
        ports = range(DEFAULT_PORT, DEFAULT_PORT + _TRIES) if port is None else (port,)
        handler = type("Handler", (_Handler,), {"viewer": viewer, "token": self.token})
        handler.web = web_folder() if web is None else web  # type: ignore[attr-defined]
        handler.hosts = {*_LOOPBACK, host.lower()}  # type: ignore[attr-defined]
        self.is_private = host in _LOOPBACK
        if not self.is_private:
            handler.hosts |= {socket.gethostname().lower(), socket.getfqdn().lower()}  # type: ignore[attr-defined]
            handler.any_address = True  # type: ignore[attr-defined]
        self._server = _bind(host, ports, handler)
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The page's address, with the token."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::", "") else self.host
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}/?token={self.token}"

    def start(self) -> None:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.2},
            name="viewer server",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join(timeout=5)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed in the middle is no error; the rest is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            logger.warning("a request failed: %s: %s", type(error).__name__, error)


class _Server6(_Server):
    address_family = socket.AF_INET6


def _bind(host: str, ports: Any, handler: Any) -> _Server:
    kind = _Server6 if ":" in host else _Server
    problem = ""
    for port in ports:
        try:
            return kind((host, port), handler)
        except OSError as error:
            problem = f"cannot listen on {host} port {port}: {error.strerror or error}"
        except OverflowError:
            raise ViewError(f"--port {port}: expected 0 to 65535") from None
    more = f" (nor on the next {len(ports) - 1})" if len(ports) > 1 else ""
    raise ViewError(f"{problem}{more}; choose another --port, or 0 for any that is free")


class _Handler(BaseHTTPRequestHandler):
    viewer: Viewer
    token: str
    web: Path
    hosts: set[str]
    any_address = False  # a number, which no foreign name can stand for
    protocol_version = "HTTP/1.1"
    server_version = "megatron-laser"
    sys_version = ""
    timeout = _SOCKET_SECONDS
    disable_nagle_algorithm = True  # else a body waits until the browser has said that it got the head

    def do_GET(self) -> None:
        """The page, one of its files, or data."""
        try:
            address = urlsplit(self.path)
            query = dict(parse_qsl(address.query, keep_blank_values=True))
        except ValueError as error:  # what is no address, or has more fields than anybody means
            self._error(HTTPStatus.BAD_REQUEST, str(error))
            return
        if not self._host_is_ours():
            self._error(HTTPStatus.FORBIDDEN, "the request names another host: open the printed address")
        elif address.path.startswith("/api/"):
            self._data(address.path.removeprefix("/api/"), query)
        else:
            self._file(address.path)

    do_HEAD = do_GET

    def _host_is_ours(self) -> bool:
        """Whatever port: through an SSH tunnel it is another one."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            return False
        return host is not None and (host in self.hosts or (self.any_address and _is_address(host)))

    def _data(self, path: str, query: dict[str, str]) -> None:
        shown = self.headers.get("X-Token") or query.get("token", "")
        if not hmac.compare_digest(shown.encode(), self.token.encode()):
            self._error(
                HTTPStatus.UNAUTHORIZED, "the token is missing or wrong: open the address that `view` printed"
            )
            return
        try:
            found = to_json(self.viewer.answer(path, query))
        except NotThere as error:
            self._error(HTTPStatus.NOT_FOUND, str(error))
            return
        except (
            Exception
        ) as error:  # of a run's files that nobody has thought of: the page says it, the rest goes on
            logger.exception("api/%s failed", path)
            self._error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
            return
        self._send(HTTPStatus.OK, "application/json", found)

    def _file(self, path: str) -> None:
        """One of the page's files; by a list of names, so that no path leads out of the folder."""
        name = path.lstrip("/") or "index.html"
        file = _web_files(self.web).get(name)
        if file is None:
            self._error(HTTPStatus.NOT_FOUND, "no such page")
            return
        self._send(HTTPStatus.OK, _TYPES[file.suffix], file.read_bytes(), pack=_packed_once)

    def _error(self, status: HTTPStatus, message: str) -> None:
        self._send(status, "application/json", orjson.dumps({"error": message}))

    def _send(
        self, status: HTTPStatus, kind: str, body: bytes, pack: Callable[[bytes], bytes] | None = None
    ) -> None:
        self.send_response(status)
        if len(body) >= _WORTH_PACKING and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = (pack or _packed)(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request, but for who looks for a fault."""
        logger.debug(format, *args)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def to_json(found: Any) -> bytes:
    """UTF-8; NaN and infinities as null."""
    return orjson.dumps(found)


def _packed(body: bytes) -> bytes:
    return gzip.compress(body, compresslevel=1, mtime=0)


@lru_cache(maxsize=64)
def _packed_once(body: bytes) -> bytes:
    """The same for the page's files, which are few and asked for again and again."""
    return _packed(body)


@lru_cache(maxsize=8)
def _web_files(web: Path) -> dict[str, Path]:
    """Name below the folder -> file; those of a kind that the page may have."""
    return {
        path.relative_to(web).as_posix(): path
        for path in sorted(web.rglob("*"))
        if path.suffix in _TYPES and path.is_file() and not path.is_symlink()
    }
