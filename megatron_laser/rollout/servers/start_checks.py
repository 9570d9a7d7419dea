"""What a run with servers can find wrong before a model is built or a server is started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.config.checks.rollout import colocated_gpus
from megatron_laser.config.process_environment import read_place
from megatron_laser.config.schema.rollout import RolloutConfig
from megatron_laser.rollout.nccl import DEBUG, debugs_collectives
from megatron_laser.rollout.open_files import named_servers, raise_open_files
from megatron_laser.rollout.servers.command import find_python
from megatron_laser.rollout.servers.fp8_gpus import check_gpus
from megatron_laser.rollout.servers.installed import ask_installed


def refuse_colocated(config: RunConfig) -> None:
    """Does nothing for other settings. Call on rank 0.

    Raises:
        ConfigError: this process's allocator cannot share memory, torch differs between trainer and servers, or the
            trainer spans several nodes, or several GPUs.
    """
    rollout = config.rollout
    if rollout.engine != "sglang" or rollout.weight_sync != "colocated":
        return
    problems = expandable_segments(os.environ) + several_nodes(os.environ) + several_gpus(config)
    python = find_python(rollout.sglang, Path.cwd())
    problems += different_torch(torch.__version__, ask_installed(python, nccl=False).torch, python)
    if problems:
        raise ConfigError(problems)


def expandable_segments(environment: Mapping[str, str]) -> list[str]:
    """Memory of expandable segments cannot be opened by another process's allocator."""
    return [
        f"rollout.weight_sync: colocated with {name}={environment[name]}: memory of expandable segments cannot be "
        "shared between processes; unset it, or use weight_sync: distributed"
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        if "expandable_segments:true" in environment.get(name, "").replace(" ", "").lower()
    ]


def several_nodes(environment: Mapping[str, str]) -> list[str]:
    """Memory is handed over within a node: torchrun's WORLD_SIZE ranks must all be local ones."""
    place = read_place(environment)
    ranks, local = place.world_size, place.local_world_size
    if ranks == local:
        return []
    return [
        f"rollout.weight_sync: colocated with {ranks} ranks, of which {local} are on this node: servers take weights "
        "from the memory of their own node only; train on one node, or use weight_sync: distributed with servers on "
        "GPUs of their own"
    ]


def several_gpus(config: RunConfig) -> list[str]:
    """A handle names a device by its number, which means another GPU in a server that sees another one only.

    Buckets lie on rank 0's GPU. CUDA may open them in a context of the wrong device, or copy under its name.
    """
    gpus = colocated_gpus(config.rollout)
    if gpus is None or gpus == 1:
        return []
    sglang = config.rollout.sglang
    return [
        f"rollout.weight_sync: colocated with rollout.sglang.servers {sglang.servers} x tensor {sglang.tensor} = "
        f"{gpus} GPUs: weights lie on rank 0's GPU, and handles to them are not known to be right in servers on other "
        "ones; use one GPU for both sides, or weight_sync: distributed with servers on GPUs of their own"
    ]


def different_torch(ours: str, theirs: str | None, python: str) -> list[str]:
    """Handles to memory are a private format of torch. What follows a + (the CUDA of a build) may differ."""
    if theirs is not None and theirs.split("+")[0] == ours.split("+")[0]:
        return []
    return [
        f"rollout.weight_sync: colocated with torch {theirs or '(none)'} in the servers' environment ({python}) and "
        f"torch {ours} in the trainer's: handles to memory do not pass between releases; install the same torch in "
        "both, or use weight_sync: distributed"
    ]


def check_start(config: RunConfig) -> None:
    """Does nothing for `rollout.engine: in_process`. Call on rank 0.

    Raises:
        ConfigError: colocated servers cannot work here (see `refuse_colocated`), nor FP8 ones on these GPUs, torch's
            debugging would hang the weight group, or this process may not have as many connections as
            `rollout.max_concurrency_per_server` asks for.
    """
    rollout = config.rollout
    if rollout.engine != "sglang":
        return
    if problems := debugged_broadcasts(rollout, os.environ):
        raise ConfigError(problems)
    if rollout.sglang.urls is None and rollout.sglang.endpoints is None:  # servers will be on this node
        check_gpus(config)
    raise_open_files(rollout.max_concurrency_per_server, named_servers(rollout))
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
