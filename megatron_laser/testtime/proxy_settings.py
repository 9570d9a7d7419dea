"""Where the proxy listens, who may ask it, and how much one request may cost."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from megatron_laser.errors import TestTimeError


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
