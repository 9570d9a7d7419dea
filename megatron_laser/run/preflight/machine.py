"""What the run needs of this machine: room on its disks, folders that it may write, and an environment for servers."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.errors import Finding
from megatron_laser.rollout.servers.start_checks import check_start
from megatron_laser.run.output_checks import Standing, check_checkpoints, check_output_folder
from megatron_laser.run.output_folder import also_written
from megatron_laser.run.preflight.disk import disk_findings, existing_part
from megatron_laser.run.preflight.ledger import Ledger, needed
from megatron_laser.run.preflight.model_inputs import ModelInputs
from megatron_laser.weight_sync.feasibility import check_servers

GROUP = "Machine"


def look_at_servers(config: RunConfig, ledger: Ledger) -> None:
    """Whether servers can be started and given weights; asks their interpreter, which may take seconds."""
    with ledger.topic(GROUP, "servers"):
        check_start(config)
        check_servers(config)
        ledger.add(GROUP, [Finding("servers", "ok", _servers(config))])


def look_at_disks(config: RunConfig, model: ModelInputs, ledger: Ledger, *, overwrite: bool = False) -> None:
    """Whether what the run writes has room."""
    with ledger.topic(GROUP, "disk space"):
        needed(model.architecture, "config.json")
        ledger.add(GROUP, disk_findings(config, overwrite=overwrite))


def look_at_layers(config: RunConfig, ledger: Ledger) -> None:
    """Whether this machine can build the layers of `model.layers`; a warning, since the run may have another one."""
    from megatron_laser.model.transformer_engine import use_transformer_engine

    topic = "layers"
    with ledger.topic(GROUP, topic):
        try:
            with_engine = use_transformer_engine(config.model.layers)
        except ConfigError as error:
            ledger.add(GROUP, [Finding(topic, "warning", f"on this machine {'; '.join(error.problems)}")])
            return
        text = "of Transformer Engine" if with_engine else "of torch"
        ledger.add(GROUP, [Finding(topic, "ok", f"{text} (model.layers is {config.model.layers})")])


def look_at_folders(config: RunConfig, ledger: Ledger, *, overwrite: bool = False) -> bool:
    """Whether the run can write where it is told to, and no other run is there. Creates nothing.

    Args:
        overwrite: a run that is there will be moved aside, and may be any.

    Returns:
        Whether this run is there and has finished, so that it will write nothing.
    """
    standing: Standing | None = None
    with ledger.topic(GROUP, "run.output_dir"):
        output = Path(config.run.output_dir)
        finding = folder_finding("run.output_dir", output)
        if finding.level != "error" and not overwrite:
            standing = check_output_folder(config)
            finding = _standing_finding(config, standing) or finding
        ledger.add(GROUP, [finding])
    done = standing is not None and standing.is_done(config.run.steps)
    named = {"checkpoint.folder": config.checkpoint.folder, "rollout.sync_folder": config.rollout.sync_folder}
    for setting, folder in also_written(config):
        with ledger.topic(GROUP, setting):
            finding = folder_finding(setting, folder)
            if setting == "checkpoint.folder" and finding.level != "error" and standing and not done:
                check_checkpoints(config, standing)
            if finding.level == "error" or named[setting] is not None:
                ledger.add(GROUP, [finding])
    return done


def _standing_finding(config: RunConfig, standing: Standing) -> Finding | None:
    topic, folder = "run.output_dir", config.run.output_dir
    if standing.record is None:
        return None
    if standing.is_done(config.run.steps):
        text = f"{folder} holds this run, which has finished its {standing.finished} steps: nothing is left to do"
        return Finding(
            topic, "note", text, (), "raise run.steps to train on, or choose another run.output_dir"
        )
    return Finding(topic, "note", f"{folder} holds this run, which goes on")


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
