"""Open files of a process: each connection is one, and limits of 1024 are common on clusters."""

from __future__ import annotations

import contextlib
import resource

from megatron_laser.config import ConfigError
from megatron_laser.config.schema.rollout import RolloutConfig

_BESIDE = 256  # files, pipes and control connections that a process has beside its requests
_ENOUGH = 65536  # no more than that: some programs walk through all descriptors that they might have


def named_servers(rollout: RolloutConfig) -> int:
    """Servers that the settings speak of: `urls`, or those of one node. Other nodes may publish more."""
    return rollout.sglang.servers if rollout.sglang.urls is None else len(rollout.sglang.urls)


def raise_open_files(per_server: int, servers: int) -> int:
    """Let this process, and what it starts, have `per_server` connections to each server; returns its soft limit then.

    Raises:
        ConfigError: the hard limit is lower.
    """
    connections = per_server * servers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _fit(connections, hard) < connections:
        raise ConfigError(
            [
                f"rollout.max_concurrency_per_server: {per_server} requests at once on each of {servers} server(s) "
                f"need {connections + _BESIDE} open files, and this process may have {hard} (ulimit -Hn); raise that "
                "limit where the job is started, or lower rollout.max_concurrency_per_server to "
                f"{max((hard - _BESIDE) // servers, 1)}"
            ]
        )
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited:
        return soft
    wanted = max(soft, connections + _BESIDE, _ENOUGH)
    wanted = wanted if hard == unlimited else min(wanted, hard)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def connections_that_fit(wanted: int) -> int:
    """As many of `wanted` connections as the hard limit allows, for which the soft one is raised; 1 at least."""
    fit = max(1, _fit(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with contextlib.suppress(
        ConfigError
    ):  # not even one beside everything else: the first connection will say so
        raise_open_files(fit, 1)
    return fit


def _fit(connections: int, hard: int) -> int:
    return connections if hard == resource.RLIM_INFINITY else min(connections, hard - _BESIDE)
