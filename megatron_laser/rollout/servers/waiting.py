"""Waiting for the servers of other `serve` processes, for scripts that start trainer and servers together."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.rollout.endpoints import Endpoints, merged, read_parts
from megatron_laser.rollout.servers.process import ServeError

_POLL = 0.5  # seconds
_PROGRESS = 30.0  # seconds between two lines
_OLD = (
    120.0  # seconds after which a file is of a serve that ended with its node: others write it again every 30
)


def wait_for_servers(config: RunConfig, nodes: int, say: Callable[[str], None]) -> None:
    """Return when all servers of `nodes` nodes answer. Files that nobody writes again do not count.

    Args:
        config: the run; rollout.sglang.endpoints is where they publish.
        nodes: how many `serve` processes there are.
        say: prints one line for the user.

    Raises:
        ConfigError: rollout.sglang.endpoints is not set.
        ServeError: they did not answer within rollout.sglang.start_deadline.
    """
    sglang = config.rollout.sglang
    if sglang.endpoints is None:
        raise ConfigError(["rollout.sglang.endpoints: required by --wait, which looks for the servers there"])
    needed, started, said = nodes * sglang.servers, time.monotonic(), 0.0
    first: dict[Path, float] = {}
    while True:
        try:
            parts = read_parts(sglang.endpoints)
            merged(sglang.endpoints, parts)  # the run will read it so
            old = [
                file for file, part in parts.items() if _is_old(part, first.setdefault(file, part.updated))
            ]
            fresh = [part for file, part in parts.items() if file not in old]
            states = [server.state for part in fresh for server in part.servers]
            seen = f"{states.count('ready')} of {needed} servers answer" + "".join(
                f"; {file} was last written {time.time() - parts[file].updated:.0f} s ago by its node's clock and does "
                "not count: delete it if that node serves no longer"
                for file in old
            )
            if states.count("ready") >= needed:
                say(f"{seen}, after {time.monotonic() - started:.0f} s")
                return
        except ConfigError as error:
            seen = error.problems[0]
        waited = time.monotonic() - started
        if waited > sglang.start_deadline:
            raise ServeError(
                f"after {waited:.0f} s (rollout.sglang.start_deadline): {seen}; look at the output of serve on the "
                f"rollout nodes, and at the logs beside {sglang.endpoints}"
            )
        if waited - said >= _PROGRESS:
            said = waited
            say(f"waiting for servers since {waited:.0f} s: {seen}")
        time.sleep(_POLL)


def _is_old(part: Endpoints, first_seen: float) -> bool:
    """Whether a file lies there since a while; one that was written again while we wait is not, whatever its clock."""
    return part.updated == first_seen and abs(time.time() - part.updated) > _OLD
