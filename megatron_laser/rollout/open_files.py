"""Open files of a process: each connection is one, and limits of 1024 are common on clusters."""

from __future__ import annotations

import resource

from megatron_laser.config import ConfigError

_BESIDE = 256  # files, pipes and control connections that a process has beside its requests
_ENOUGH = 65536  # no more than that: some programs walk through all descriptors that they might have


def raise_open_files(connections: int) -> int:
    """Let this process, and what it starts, have `connections` connections at once; returns its soft limit then.

    Raises:
        ConfigError: the hard limit is lower.
    """
    needed = connections + _BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and hard < needed:
        raise ConfigError(
            [
                f"rollout.max_concurrency: {connections} requests at once need {needed} open files, and this process "
                f"may have {hard} (ulimit -Hn); raise that limit where the job is started, or lower "
                f"rollout.max_concurrency to {max(hard - _BESIDE, 1)}"
            ]
        )
    if soft == unlimited:
        return soft
    wanted = max(soft, needed, _ENOUGH)
    wanted = wanted if hard == unlimited else min(wanted, hard)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
