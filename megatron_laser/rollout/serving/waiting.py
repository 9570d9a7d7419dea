"""Waiting for the servers of other `serve` processes, for scripts that start trainer and servers together."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.rollout.endpoints import read_endpoints
from megatron_laser.rollout.serving.process import ServeError

_POLL = 0.5  # seconds
_PROGRESS = 30.0  # seconds between two lines


def wait_for_servers(config: RunConfig, nodes: int, say: Callable[[str], None]) -> None:
    """Return when all servers of `nodes` nodes answer.

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
    while True:
        try:
            states = [server.state for server in read_endpoints(sglang.endpoints).servers]
            seen = f"{states.count('ready')} of {needed} servers answer"
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
