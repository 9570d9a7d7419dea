"""Addresses of servers as URLs, and back: an IPv6 address stands in brackets there. No network."""

from __future__ import annotations

from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}


def http_url(host: str, port: int) -> str:
    """`http://HOST:PORT`; an IPv6 address gets the brackets without which no client finds the port."""
    bare = host.strip("[]")
    return f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}"


def host_and_port(url: str) -> tuple[str, int]:
    """(host without brackets, port or its scheme's own) of an http or https URL.

    Raises:
        ValueError: anything else, an IPv6 address without brackets among it.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number, brackets that do not close
        host, port = None, None
    if not host or parts.scheme not in _PORTS:
        raise ValueError(
            "expected an address such as http://10.0.0.5:30000, with brackets around IPv6: http://[fd00::5]:30000"
        )
    return host, _PORTS[parts.scheme] if port is None else port
