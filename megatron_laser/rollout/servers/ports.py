"""Ports: taken or free, asked before a server is started rather than after it has loaded a model."""

from __future__ import annotations

import socket

import psutil

from megatron_laser.config import ConfigError

_SEARCHED = 200  # ports above the first one


class PortFinder:
    """Hands out free ports from `first` upwards, each once."""

    def __init__(self, host: str, first: int) -> None:
        self.host = host
        self.first = first
        self.skipped: list[str] = []  # what was in use, for the one who asks why
        self._next = first

    def take(self, *, exactly_first: bool = False) -> int:
        """A port on which nobody listens.

        Args:
            exactly_first: `first` or nothing, since the user has named it.

        Raises:
            ConfigError: it is in use, or no port near it is free.
        """
        while self._next <= min(self.first + _SEARCHED, 65535):
            port = self._next
            self._next += 1
            if is_free(self.host, port):
                return port
            if exactly_first:
                raise ConfigError(
                    [
                        f"rollout.sglang.port: {port} on {self.host} is in use{_user(port)}; stop that process or "
                        "choose another port"
                    ]
                )
            self.skipped.append(f"port {port} is in use{_user(port)}")
        raise ConfigError(
            [
                f"rollout.sglang.port: no free port on {self.host} from {self.first} to "
                f"{min(self.first + _SEARCHED, 65535)}; choose another one"
            ]
        )


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on `host`:`port` now.

    Raises:
        ConfigError: `host` is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError([f"rollout.sglang.host: {host} is not known here ({error.strerror})"]) from error
    with socket.socket(family, kind, protocol) as probe:
        # as servers do: a port whose last connections are still being forgotten is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno in _NOT_HERE:
                raise ConfigError(
                    [
                        f"rollout.sglang.host: {host} is not an address of this machine; expected loopback or this "
                        "node's own address"
                    ]
                ) from error
            return False
    return True


_NOT_HERE = (99,)  # EADDRNOTAVAIL


def _user(port: int) -> str:
    """Who listens on `port`, as far as this user may know."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):
        return ""
    return ""
