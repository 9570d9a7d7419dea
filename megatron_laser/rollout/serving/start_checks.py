"""What a run with servers can find wrong with its own process, before a model is built or a server is started."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.config.schema_rollout import RolloutConfig
from megatron_laser.rollout.nccl import DEBUG, debugs_collectives
from megatron_laser.rollout.open_files import raise_open_files
from megatron_laser.rollout.serving.colocated import refuse_colocated


def check_start(config: RunConfig) -> None:
    """Does nothing for `rollout.engine: in_process`. Call on rank 0.

    Raises:
        ConfigError: colocated servers cannot work here (see `refuse_colocated`), torch's debugging would hang the
            weight group, or this process may not have `rollout.max_concurrency` connections.
    """
    rollout = config.rollout
    if rollout.engine != "sglang":
        return
    if problems := debugged_broadcasts(rollout, os.environ):
        raise ConfigError(problems)
    raise_open_files(rollout.max_concurrency)
    refuse_colocated(config)


def debugged_broadcasts(rollout: RolloutConfig, environment: Mapping[str, str]) -> list[str]:
    """With DETAIL torch compares each collective with its peers' first, and servers do not know of that."""
    if rollout.weight_sync != "distributed" or not debugs_collectives(environment):
        return []
    return [
        f"rollout.weight_sync: distributed with {DEBUG}={environment[DEBUG]}: the trainer would compare each broadcast "
        f"with the servers', which do not answer that, until rollout.sync_deadline; unset {DEBUG} or set it to INFO, "
        "or use weight_sync: disk"
    ]
