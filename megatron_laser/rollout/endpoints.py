"""The endpoints file: where `serve` says which servers there are, and where a run looks for them.

One JSON object per node, replaced atomically and readable by its owner only, since it holds the API key. Several
nodes publish into one folder, each under its own name; a reader merges what is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_laser.config import ConfigError

ServerState = Literal["starting", "ready", "held", "restarting", "failed"]
"""`starting`: loads the model; `ready`: answers; `held`: answers, but was started again after its predecessor had been
given other weights, and is paused until it gets the current ones; `restarting`: died or hung, starts again soon;
`failed`: died too often and is given up."""

_EXPECTED = "expected the endpoints of `megatron-laser serve`: is it running, and on this file system?"


class EndpointsError(ConfigError):
    """An endpoints file is not there, cannot be read, or contradicts another one."""


@dataclass(frozen=True, slots=True)
class ServerEndpoint:
    """One server.

    Attributes:
        url: its address, http://HOST:PORT.
        start: how often this slot has been started; a higher number than before means a new process with the
            weights of the model folder.
        pid: its process on its node; None between two starts.
        state: what `serve` knows of it.
        torch_version, nccl_version: of the environment that it runs in; None: unknown, or no NCCL there.
    """

    url: str
    start: int = 1
    pid: int | None = None
    state: ServerState = "ready"
    torch_version: str | None = None
    nccl_version: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The servers of one or more nodes.

    Attributes:
        servers: all of them, whatever their state.
        router_url: address for generation only; control goes to each server. It answers once all servers do.
        api_key: what they ask for as a bearer token; None: nothing.
        model: the model folder as the servers' nodes name it.
        sglang_version: None until a server has answered.
        updated: when the file was written, in seconds since 1970 by the clock of its node.
    """

    servers: tuple[ServerEndpoint, ...]
    router_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    sglang_version: str | None = None
    updated: float = 0.0


def publish(path: Path, endpoints: Endpoints) -> None:
    """Write `endpoints` to `path` (mode 0600) in one step; a reader sees the old file or the new one.

    Raises:
        OSError: the folder cannot be written.
    """
    record = {
        "servers": [
            {
                "url": server.url,
                "pid": server.pid,
                "start": server.start,
                "state": server.state,
                "torch_version": server.torch_version,
                "nccl_version": server.nccl_version,
            }
            for server in endpoints.servers
        ],
        "router_url": endpoints.router_url,
        "api_key": endpoints.api_key,
        "model": endpoints.model,
        "sglang_version": endpoints.sglang_version,
        "updated": endpoints.updated or time.time(),
    }
    write_private(path, json.dumps(record, indent=1) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, readable and writable by its owner only.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a dot in front: readers of the folder pass over it
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def read_endpoints(path: Path) -> Endpoints:
    """The servers that `path` names: a file of `serve`, or a folder of which every *.json is one.

    Raises:
        EndpointsError: there is no such file, it is not one of `serve`, two of a folder ask for different API keys,
            or a router serves one node of several.
    """
    return merged(path, read_parts(path))


def read_parts(path: Path) -> dict[Path, Endpoints]:
    """What each file of `path` says; see `read_endpoints`.

    Raises:
        EndpointsError: there is no such file, or it is not one of `serve`.
    """
    return {file: _read(file) for file in _files(path)}


def merged(path: Path, read: Mapping[Path, Endpoints]) -> Endpoints:
    """The servers of all files of `path`; raises as `read_endpoints` does."""
    files, parts = list(read), list(read.values())
    if len(parts) == 1:
        return parts[0]
    servers = tuple(server for part in parts for server in part.servers)
    addresses = [server.url for server in servers]
    twice = sorted({url for url in addresses if addresses.count(url) > 1})
    if twice:
        raise EndpointsError(
            [
                f"{path}: {', '.join(twice)} stands in more than one file; delete the files of nodes that serve no "
                "longer, and give each node's own address in rollout.sglang.host"
            ]
        )
    keys = {part.api_key for part in parts}
    if len(keys) > 1:
        raise EndpointsError(
            [
                f"{path}: its {len(parts)} files have different API keys; delete the files of nodes that serve no "
                "longer, or set rollout.sglang.api_key_env's variable to one key on all nodes"
            ]
        )
    routed = [file.name for file, part in zip(files, parts) if part.router_url is not None]
    if routed:
        raise EndpointsError(
            [
                f"{path}: {', '.join(routed)} has a router, which knows the servers of its own node only; with "
                "several nodes set rollout.sglang.router to false, and the run spreads the requests itself"
            ]
        )
    return Endpoints(
        servers=servers,
        api_key=keys.pop(),
        model=parts[0].model,
        sglang_version=next((part.sglang_version for part in parts if part.sglang_version), None),
        updated=min(part.updated for part in parts),
    )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise EndpointsError([f"{path} does not exist; {_EXPECTED}"])
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.json") if not file.name.startswith("."))
    if not files:
        raise EndpointsError([f"{path} holds no *.json; {_EXPECTED}"])
    return files


def _read(file: Path) -> Endpoints:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return Endpoints(
            servers=tuple(_server(item) for item in record["servers"]),
            router_url=_optional(record, "router_url", str),
            api_key=_optional(record, "api_key", str),
            model=_optional(record, "model", str),
            sglang_version=_optional(record, "sglang_version", str),
            updated=float(record.get("updated") or 0.0),
        )
    except OSError as error:
        raise EndpointsError([f"{file} cannot be read: {error}"]) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EndpointsError(
            [f"{file} is not a file of `megatron-laser serve` ({error!r}); delete it or name another one"]
        ) from error


def _server(item: dict[str, Any]) -> ServerEndpoint:
    url, start, state = item["url"], item.get("start", 1), item.get("state", "ready")
    if not (isinstance(url, str) and url.startswith(("http://", "https://"))):
        raise ValueError(f"url {url!r}")
    if not isinstance(start, int) or start < 1:
        raise ValueError(f"start {start!r}")
    if state not in get_args(ServerState):
        raise ValueError(f"state {state!r}")
    return ServerEndpoint(
        url.rstrip("/"),
        start,
        _optional(item, "pid", int),
        state,
        _optional(item, "torch_version", str),
        _optional(item, "nccl_version", str),
    )


def _optional(record: dict[str, Any], name: str, kind: type) -> Any:
    value = record.get(name)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} {value!r}")
    return value
