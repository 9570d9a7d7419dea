"""What this machine offers: versions and optional parts on both sides, GPUs, and what a run can do with them.

Interpreters are asked for their facts in children, each with a deadline; what two environments mean for a run
(differences, kinds of weight sync, variables) follows from the facts alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_laser import __version__
from megatron_laser.config import ConfigError
from megatron_laser.config.schema.rollout import SglangConfig
from megatron_laser.rollout.nccl import server_settings, trainer_settings
from megatron_laser.rollout.servers.command import child_environment, find_python
from megatron_laser.weight_sync.feasibility import SyncSide, sync_feasibility

ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
SHOWN = (
    *("NVTE_", "NCCL_", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCH_DISTRIBUTED_DEBUG"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS"),
)
_COMPARED = ("python", "torch", "cuda", "nccl", "triton", "transformers", "numpy")

_FACTS = Path(__file__).with_name("environment_facts.py")
_DEADLINE = (
    180.0  # seconds: the first import of torch and Transformer Engine from a network file system is slow
)


def ask(python: str, environment: Mapping[str, str], deadline: float = _DEADLINE) -> dict[str, str]:
    """The facts of `python`'s environment; {"error": REASON} where it does not run, crashes, or takes too long."""
    command = [python, str(_FACTS)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=deadline, env=dict(environment)
        )
    except subprocess.TimeoutExpired:
        return {"error": f"{python} has not answered within {deadline:g} s"}
    except OSError as error:
        return {"error": f"{python} does not run: {error}"}
    if done.returncode < 0:
        return {"error": f"{python} ended with signal {-done.returncode} while it imported its packages"}
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = done.stderr.strip()[-300:] or f"exit status {done.returncode}, and no facts"
        return {"error": f"{python} does not run: {reason}"}
    return {str(name): str(value) for name, value in facts.items()}


def ask_both(trainer: str, servers: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The facts of the trainer's and of the servers' interpreter, side by side; None: there is one for both."""
    with ThreadPoolExecutor(2) as pool:
        ours = pool.submit(ask, trainer, os.environ)
        if servers is None:
            return ours.result(), ours.result()
        theirs = pool.submit(ask, servers, child_environment(os.environ, python=servers, mark=""))
        return ours.result(), theirs.result()


def gpus() -> dict[str, str]:
    """driver, and the GPUs by number: name and memory, of nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"driver": f"none found: nvidia-smi: {error}"}
    if done.returncode != 0:
        return {"driver": f"none found: nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}"}
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        index, name, memory, driver = (part.strip() for part in line.split(","))
        found["driver"] = driver
        found[f"GPU {index}"] = f"{name}, {memory}"
    return found or {"driver": "no GPU"}


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """Name -> what the servers have instead, of what both sides have and should share."""
    return {
        name: f"{ours.get(name, 'none')} in the trainer, {theirs.get(name, 'none')} in the servers"
        for name in _COMPARED
        if ours.get(name, "none").split(" ")[0] != theirs.get(name, "none").split(" ")[0]
    }


def weight_syncs(
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    environment: Mapping[str, str],
    python: str,
    *,
    gpus: bool,
) -> dict[str, str]:
    """Each `rollout.weight_sync` -> "can work", or why not.

    Args:
        environment: of the trainer's processes, and of `serve`.
        python: the servers' interpreter, for messages.
        gpus: the machine has some; without, both sides compute on CPUs.
    """
    trainer = SyncSide(_version(ours, "torch"), _nccl(ours, gpus), trainer_settings(environment))
    torch = _version(theirs, "torch") if _version(theirs, "sglang") else None
    servers = SyncSide(torch, _nccl(theirs, gpus), server_settings(environment, {}), python)
    found = sync_feasibility(trainer, servers, environment)
    if "error" in theirs:
        found = dict.fromkeys(found, theirs["error"])
    return {kind: "can work" if why is None else f"cannot work: {why}" for kind, why in found.items()}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those set variables that change what NCCL, Transformer Engine and the allocator do, with a word where one may
    not be set."""
    found = {}
    for name in sorted(environment):
        if name.startswith(SHOWN):
            found[name] = environment[name]
            if name in ATTENTION:
                found[name] += "  (unset it: model.attention sets it, and another value stops the trainer)"
    return found


def _version(facts: Mapping[str, str], package: str) -> str | None:
    value = facts.get(package, "not installed")
    return None if value.startswith("not installed") or "fails to import" in value else value


def _nccl(facts: Mapping[str, str], gpus: bool) -> str | None:
    value = facts.get("nccl", "unknown")
    return value if gpus and not value.startswith("unknown") else None


def describe(sglang: SglangConfig | None = None) -> dict[str, str]:
    """Name -> value, ready to print. Seconds: interpreters are asked in children, each within a deadline.

    Args:
        sglang: of the configuration whose servers are meant; None: the default interpreter's.
    """
    try:
        python: str | None = find_python(sglang or SglangConfig(), Path.cwd())
        missing = ""
    except ConfigError as error:
        python, missing = None, "; ".join(error.problems)
    one = python is None or _folder(python) == _folder(sys.executable)
    ours, theirs = ask_both(sys.executable, None if one else python)
    if missing:
        theirs = {"error": missing}
    cards = gpus()
    found = {"megatron_laser": __version__, "interpreter": sys.executable} | ours | _of_this_process() | cards
    found["servers' interpreter"] = python or missing
    if not one:
        found |= {f"  servers: {name}": theirs[name] for name in theirs}
        if "error" not in theirs:
            found |= {f"differs: {name}": text for name, text in differences(ours, theirs).items()}
    syncs = weight_syncs(
        ours, theirs, os.environ, python or "none", gpus=any("GPU " in name for name in cards)
    )
    found |= {f"weight_sync {kind}": text for kind, text in syncs.items()}
    return found | variables(os.environ)


def _of_this_process() -> dict[str, str]:
    import torch

    from megatron_laser.model import platform
    from megatron_laser.ops import available_backends

    return {
        "device": platform.device_name(),
        "threads": str(torch.get_num_threads()),
        "log-prob backends": ", ".join(available_backends(platform.device())),
    }


def _folder(python: str) -> str:
    """The folder of an interpreter, which tells environments apart: the python of a virtual one is a link."""
    return os.path.realpath(os.path.dirname(os.path.abspath(python)))
