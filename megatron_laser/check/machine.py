"""What the run needs of this machine: room on its disks, folders that it may write, and an environment for servers."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_laser.check.disk import disk_findings, existing_part
from megatron_laser.check.ledger import Ledger
from megatron_laser.config import RunConfig
from megatron_laser.findings import Finding
from megatron_laser.rollout.serving.start_checks import check_start
from megatron_laser.weight_sync.feasibility import check_servers

GROUP = "Machine"


def look_at_servers(config: RunConfig, ledger: Ledger) -> None:
    """Whether servers can be started and given weights; asks their interpreter, which may take seconds."""
    with ledger.topic(GROUP, "servers"):
        check_start(config)
        check_servers(config)
        ledger.add(GROUP, [Finding("servers", "ok", _servers(config))])


def look_at_disks(config: RunConfig, ledger: Ledger) -> None:
    """Whether what the run writes has room."""
    with ledger.topic(GROUP, "disk space"):
        ledger.add(GROUP, disk_findings(config))


def look_at_folders(config: RunConfig, ledger: Ledger) -> None:
    """Whether the run can write where it is told to. Creates nothing."""
    output = Path(config.run.output_dir)
    places = {"run.output_dir": output}
    if config.checkpoint.every and config.checkpoint.folder is not None:
        places["checkpoint.folder"] = Path(config.checkpoint.folder)
    if config.rollout.engine == "sglang" and config.rollout.sync_folder is not None:
        places["rollout.sync_folder"] = Path(config.rollout.sync_folder)
    for setting, folder in places.items():
        with ledger.topic(GROUP, setting):
            ledger.add(GROUP, [folder_finding(setting, folder)])


def folder_finding(setting: str, folder: Path) -> Finding:
    """Whether files can be written into `folder`, which need not exist yet."""
    place = existing_part(folder)
    if not place.is_dir():
        return Finding(setting, "error", f"{folder}: {place} is a file", cure=f"choose another {setting}")
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            setting,
            "error",
            f"{folder}: {place} cannot be written by this user",
            cure=f"choose another {setting}",
        )
    if place != folder.absolute():
        return Finding(setting, "ok", f"{folder} will be made")
    if (folder / "run.json").is_file():
        return Finding(setting, "note", f"{folder} holds a run, which the same settings go on with")
    return Finding(setting, "ok", f"{folder} is there")


def _servers(config: RunConfig) -> str:
    rollout, sglang = config.rollout, config.rollout.sglang
    if rollout.engine == "in_process":
        return "none are needed (rollout.engine is in_process)"
    if sglang.urls is not None:
        return f"{len(sglang.urls)} by address; they say what they are at the first contact"
    if sglang.endpoints is not None:
        return f"those that serve publishes in {sglang.endpoints}"
    return (
        f"{sglang.servers} of {sglang.tensor} {'GPU' if sglang.tensor == 1 else 'GPUs'} each can be started here"
        if (sglang.device == "cuda")
        else f"{sglang.servers} on CPUs can be started here"
    )
