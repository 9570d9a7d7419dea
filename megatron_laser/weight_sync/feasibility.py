"""Which kinds of weight sync can work between two environments, asked of their versions and settings alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.model import platform
from megatron_laser.rollout.endpoints import EndpointsError, read_endpoints
from megatron_laser.rollout.nccl import (
    debugs_collectives,
    loaded_version,
    server_settings,
    setting_problems,
    trainer_settings,
)
from megatron_laser.rollout.servers.command import child_environment, find_python
from megatron_laser.rollout.servers.installed import check_sglang
from megatron_laser.rollout.servers.start_checks import different_torch, expandable_segments, several_nodes
from megatron_laser.rollout.sglang_api import parse_version

_FRESH = 120.0  # seconds; `serve` writes its file every 30


@dataclass(frozen=True, slots=True)
class SyncSide:
    """The trainer, or the servers.

    Attributes:
        torch: its version; None: unknown, or not installed.
        nccl: "2.30.7", of the library that torch loads; None: it computes on a CPU, or the version is unknown.
        settings: of NCCL, by variable: `rollout.nccl.trainer_settings` or `server_settings`.
        python: the interpreter, for messages.
    """

    torch: str | None
    nccl: str | None
    settings: Mapping[str, str] = field(default_factory=dict)
    python: str = "rollout.sglang.python"


def trainer_side(environment: Mapping[str, str]) -> SyncSide:
    """This process, as the trainer; `environment` is its own."""
    return SyncSide(torch.__version__, trainer_nccl(), trainer_settings(environment), sys.executable)


def check_servers(config: RunConfig) -> None:
    """Whether servers that the run starts have an environment for it, and an NCCL that the trainer can talk to.

    Call on rank 0 before a model is loaded: seconds, while an interpreter imports torch. Servers given by URL, or not
    there yet, show at the first contact; of others, `serve` publishes what they have.

    Raises:
        ConfigError: no SGLang, or one for CPUs only; with `rollout.weight_sync: distributed` also another NCCL than the
            trainer's, or other settings of it.
    """
    rollout = config.rollout
    sglang = rollout.sglang
    if rollout.engine != "sglang" or sglang.urls is not None:
        return
    sides = []
    if sglang.endpoints is not None:
        with suppress(EndpointsError):
            found = read_endpoints(sglang.endpoints)
            # One that `serve` no longer writes is of servers that may have gone, and others take their place.
            for server in found.servers if abs(time.time() - found.updated) < _FRESH else ():
                settings = server.nccl_settings or {}
                sides.append(SyncSide(server.torch_version, server.nccl_version, settings, server.url))
    else:
        python = find_python(sglang, Path.cwd())
        cuda = sglang.device == "cuda"
        shared = cuda and rollout.weight_sync == "distributed"
        installed = check_sglang(python, router=sglang.router, cuda=cuda, nccl=shared)
        child = child_environment(os.environ, python=python, mark="")
        settings = server_settings(child, sglang.options)
        sides.append(SyncSide(installed.torch, installed.nccl, settings, python))
    trainer = trainer_side(os.environ)
    if rollout.weight_sync != "distributed" or trainer.nccl is None:
        return
    problems = []
    for side in sides:
        if side.nccl is None:  # on a CPU, or unknown
            continue
        if (unlike := nccl_problem(trainer.nccl, side.nccl)) is not None:
            problems.append(
                f"rollout.sglang.python: {side.python} has NCCL {side.nccl} (torch {side.torch}), the trainer NCCL "
                f"{trainer.nccl} (torch {trainer.torch}): {unlike}; install one torch in both environments, or use "
                "rollout.weight_sync: disk"
            )
        problems += setting_problems(trainer.settings, side.settings)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def trainer_nccl() -> str | None:
    """The NCCL that this process's torch has loaded, "2.30.7"; None: it computes on a CPU."""
    compiled = platform.nccl_version()
    return None if compiled is None else loaded_version() or compiled


def sync_feasibility(
    trainer: SyncSide, servers: SyncSide, environment: Mapping[str, str]
) -> dict[str, str | None]:
    """Each `rollout.weight_sync` -> None where nothing speaks against it here, or why it cannot work. Pure.

    Args:
        environment: of the trainer's processes.
    """
    return {
        "distributed": _first(_distributed_problems(trainer, servers, environment)),
        "colocated": _first(_colocated_problems(trainer, servers, environment)),
        "disk": None if servers.torch is not None else _NO_SERVERS,
    }


_NO_SERVERS = "no environment with SGLang was found; see rollout.sglang.python"


def nccl_problem(ours: str, theirs: str) -> str | None:
    """Two NCCL versions of one group: all three numbers must agree.

    Each rank sends its own with its address, and NCCL refuses any other (`init.cc`, "Mismatched NCCL version").
    """
    if parse_version(theirs) == parse_version(ours) != ():
        return None
    return "they do not form a group, which takes one version to the last number"


def debug_problems(environment: Mapping[str, str]) -> list[str]:
    """Settings of torch.distributed that the servers' side of the group does not have."""
    if not debugs_collectives(environment):
        return []
    return [
        "TORCH_DISTRIBUTED_DEBUG=DETAIL checks every collective with a second one, which the servers' side of the "
        "weight group does not send, so the first broadcast would hang; unset it, set it to INFO, or use "
        "rollout.weight_sync: disk"
    ]


def _distributed_problems(trainer: SyncSide, servers: SyncSide, environment: Mapping[str, str]) -> list[str]:
    if servers.torch is None:
        return [_NO_SERVERS]
    problems = debug_problems(environment)
    if trainer.nccl is None and servers.nccl is None:
        return problems  # gloo, which takes another torch
    if trainer.nccl is None or servers.nccl is None:
        return [
            f"NCCL {servers.nccl or '(none)'} in the servers and {trainer.nccl or '(none)'} in the trainer"
        ]
    if (unlike := nccl_problem(trainer.nccl, servers.nccl)) is not None:
        problems.append(f"NCCL {servers.nccl} in the servers and {trainer.nccl} in the trainer: {unlike}")
    return problems + setting_problems(trainer.settings, servers.settings)


def _colocated_problems(trainer: SyncSide, servers: SyncSide, environment: Mapping[str, str]) -> list[str]:
    if servers.torch is None:
        return [_NO_SERVERS]
    problems = expandable_segments(environment) + several_nodes(environment)
    return problems + different_torch(trainer.torch or "(none)", servers.torch, servers.python)


def _first(problems: list[str]) -> str | None:
    return "; ".join(problems) or None
