"""Messages between the pool and one worker: a length and JSON on a Unix socket. Nothing is unpickled."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

_HEADER = struct.Struct("!Q")


def send_message(connection: socket.socket, message: dict[str, Any], deadline: float | None = None) -> None:
    """Send one message.

    Args:
        deadline: on `time.monotonic()`'s clock; None waits for ever (a worker lives as long as its pool).

    Raises:
        TimeoutError: the deadline passed.
        OSError: the other side is gone.
    """
    body = json.dumps(message).encode("ascii")  # escapes: lone surrogates and control characters survive
    connection.settimeout(_remaining(deadline))
    connection.sendall(_HEADER.pack(len(body)) + body)


def receive_message(connection: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """Receive one message; arguments and errors as in `send_message`, and EOFError when the peer closed."""
    (length,) = _HEADER.unpack(_receive_exactly(connection, _HEADER.size, deadline))
    message: dict[str, Any] = json.loads(_receive_exactly(connection, length, deadline))
    return message


def _receive_exactly(connection: socket.socket, count: int, deadline: float | None) -> bytes:
    chunks = bytearray()
    while len(chunks) < count:
        connection.settimeout(_remaining(deadline))
        chunk = connection.recv(min(count - len(chunks), 1 << 20))
        if not chunk:
            raise EOFError("the other side closed the connection")
        chunks += chunk
    return bytes(chunks)


def _remaining(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline passed")
    return left
