"""What the run needs of this machine: room on its disks, folders that it may write, and an environment for servers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_laser.config import ConfigError, RunConfig, count_parameters, read_architecture
from megatron_laser.config.checks.rollout import quantization_warnings
from megatron_laser.config.model_folder.parameters import rank_bytes
from megatron_laser.errors import Finding
from megatron_laser.rollout.servers.start_checks import check_start
from megatron_laser.run.output_checks import (
    OutputState,
    check_checkpoints,
    check_new,
    check_output_folder,
)
from megatron_laser.run.output_folder import also_written
from megatron_laser.run.own_files import check_own
from megatron_laser.run.predicting import run_machine
from megatron_laser.run.preflight.finding_log import FindingLog, needed
from megatron_laser.run.preflight.model import ModelInputs
from megatron_laser.weight_sync.feasibility import check_servers

_DISKS = "disk space"
_TEXT_BYTES = 4  # of a token as text, about
_ID_BYTES = 4  # of a token's id, and of its log-prob
_SPARE = 0.02  # of the need: folders, metrics, logs

GROUP = "Machine"


def check_server_start(config: RunConfig, log: FindingLog) -> None:
    """Whether servers can be started and given weights; asks their interpreter, which may take seconds."""
    log.add(GROUP, [Finding("FP8 rollout", "warning", text) for text in quantization_warnings(config)])
    with log.topic(GROUP, "servers"):
        check_start(config)
        check_servers(config)
        log.add(GROUP, [Finding("servers", "ok", _servers(config))])


def check_disks(config: RunConfig, model: ModelInputs, log: FindingLog, *, overwrite: bool = False) -> None:
    """Whether what the run writes has room."""
    with log.topic(GROUP, _DISKS):
        needed(model.architecture, "config.json")
        log.add(GROUP, disk_findings(config, overwrite=overwrite))


def check_layers(config: RunConfig, log: FindingLog) -> None:
    """Whether this machine can build the layers of `model.layers`; a warning, since the run may have another one."""
    from megatron_laser.model.transformer_engine import use_transformer_engine

    topic = "layers"
    with log.topic(GROUP, topic):
        try:
            with_engine = use_transformer_engine(config.model.layers)
        except ConfigError as error:
            log.add(GROUP, [Finding(topic, "warning", f"on this machine {'; '.join(error.problems)}")])
            return
        text = "of Transformer Engine" if with_engine else "of torch"
        log.add(GROUP, [Finding(topic, "ok", f"{text} (model.layers is {config.model.layers})")])


def check_machine(config: RunConfig, log: FindingLog) -> None:
    """Whether `logging.machine` is one."""
    if config.logging.machine is not None:
        with log.topic(GROUP, "logging.machine"):
            machine = run_machine(config)
            said = "of another device: no mfu/ and no plan/" if machine is None else machine.name
            log.add(GROUP, [Finding("logging.machine", "ok", said)])


def check_folders(
    config: RunConfig, log: FindingLog, *, overwrite: bool = False, change: bool | None = None
) -> bool:
    """Whether the run can write where it is told to, and no other run is there. Creates nothing.

    Args:
        overwrite: a run that is there will be moved aside, and may be any.
        change: as `run_preflight`.

    Returns:
        Whether this run is there and has finished, so that it will write nothing.
    """
    state: OutputState | None = None
    with log.topic(GROUP, "run.output_dir"):
        output = Path(config.run.output_dir)
        finding = folder_finding("run.output_dir", output)
        if finding.level != "error" and not overwrite:
            state = check_output_folder(config, change=change is not False)
            finding = _state_finding(config, state) or finding
        elif finding.level != "error":
            check_own(output)
            check_new(config)
        log.add(GROUP, [finding])
        if state is not None and change is None:
            log.add(GROUP, change_findings(state))
    done = state is not None and state.is_done(config.run.steps)
    named = {"checkpoint.folder": config.checkpoint.folder, "rollout.sync_folder": config.rollout.sync_folder}
    for setting, folder in also_written(config):
        with log.topic(GROUP, setting):
            finding = folder_finding(setting, folder)
            if setting == "checkpoint.folder" and finding.level != "error" and state and not done:
                check_checkpoints(config, state)
            if finding.level == "error" or named[setting] is not None:
                log.add(GROUP, [finding])
    return done


def _state_finding(config: RunConfig, state: OutputState) -> Finding | None:
    topic, folder = "run.output_dir", config.run.output_dir
    if state.branch is not None:
        text = f"{folder} will be a branch of the run in {state.branch.folder} after its step {state.branch.step}"
        return Finding(topic, "note", text)
    if state.record is None:
        return None
    if state.is_done(config.run.steps):
        text = (
            f"{folder} holds this run, which has finished its {state.finished} steps: nothing is left to do"
        )
        cure = "raise run.steps"
        if state.planned is not None:
            text = f"{folder} holds this run, which has finished early, after step {state.finished}"
            cure = "change run.early_stop"
        return Finding(topic, "note", text, (), f"{cure} to train on, or choose another run.output_dir")
    if state.back_to is not None:
        text = f"{folder} holds this run, which goes back to step {state.back_to}; what came after it is moved aside"
        return Finding(topic, "note", text)
    where = (
        "which goes on" if state.step is None else f"which goes on from its checkpoint of step {state.step}"
    )
    return Finding(topic, "note", f"{folder} holds this run, {where}")


def change_findings(state: OutputState) -> Iterator[Finding]:
    """Settings that are otherwise than the run that goes on had them."""
    topic = "changed settings"
    for kind in ("identity", "learning", "running"):
        changed = [one for one in state.changes if one.kind == kind]
        if not changed:
            continue
        text = "; ".join(f"{one.key} {one.before!r} there and {one.after!r} here" for one in changed)
        if kind == "learning" and state.branch is None:
            cure = f"train with --change, which goes on with them from step {changed[0].step} on"
            yield Finding(topic, "warning", f"{text}: what is learned", cure=cure)
        else:
            yield Finding(topic, "note", text)


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
    if rollout.engine == "none":
        return "none are needed (nothing is generated)"
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


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that the run writes into `folder`.

    first: until the run first publishes it, without which nothing of it is saved. most: at the fullest moment. what: in
    words. certain: False for an upper bound.
    """

    folder: Path
    what: str
    most: int
    first: int
    certain: bool = True


def disk_findings(config: RunConfig, *, overwrite: bool = False) -> list[Finding]:
    """One finding for each file system that the run writes to."""
    by_device: dict[int, list[Need]] = {}
    for need in disk_needs(config, overwrite=overwrite):
        by_device.setdefault(existing_part(need.folder).stat().st_dev, []).append(need)
    return [_finding(needs) for needs in by_device.values()]


def disk_needs(config: RunConfig, *, overwrite: bool = False) -> Iterator[Need]:
    """What the run writes: checkpoints, the export, weights for servers, responses.

    Args:
        overwrite: an earlier run is renamed, so that what it has written stays on the disk.
    """
    output = Path(config.run.output_dir)
    parameters = count_parameters(read_architecture(config.model.path))
    whole = rank_bytes(parameters, config.model.dtype, shards=1, reference_model=False)
    weights, checkpoint = whole.weights, whole.weights + whole.optimizer
    settings, steps = config.checkpoint, config.run.steps
    if settings.every:
        root = Path(settings.folder or output / "checkpoints")
        there = [] if overwrite else list(root.glob("step_*"))
        saved = steps // settings.every + bool(steps % settings.every)
        for_good = steps // settings.keep_every if settings.keep_every else 0
        # A new one is complete before the oldest is deleted.
        best = int(settings.best.metric is not None)
        kept = min(saved + best, for_good + min(settings.keep_last, saved) + best + 1)
        yield Need(
            root,
            f"{kept} checkpoints of {_size(checkpoint)}"
            if kept > 1
            else f"a checkpoint of {_size(checkpoint)}",
            max(0, kept * checkpoint - sum(map(_folder_bytes, there))),
            0 if there else checkpoint,
        )
    elif settings.best.metric is not None:
        root = Path(settings.folder or output / "checkpoints")
        yield Need(root, f"2 checkpoints of {_size(checkpoint)}", 2 * checkpoint, checkpoint)
    if settings.export_hf:
        yield Need(output, f"the export to hf/ of {_size(weights)}", weights, weights)
    if settings.export_hf and settings.best.metric is not None:
        yield Need(output, f"the export to hf_best/ of {_size(weights)}", weights, 0)
    if settings.export_every and (exports := steps // settings.export_every):
        # A new one is complete before the oldest is deleted.
        exports = exports if settings.export_keep is None else min(exports, settings.export_keep + 1)
        yield Need(output, f"{exports} exports to hf_step_N/ of {_size(weights)} each", exports * weights, 0)
    if config.rollout.engine == "sglang" and config.rollout.weight_sync == "disk":
        folder = Path(config.rollout.sync_folder or output / "weights")
        moved = overwrite and config.rollout.sync_folder is None
        # the first new ones replace them
        left = 0 if moved else sum(_folder_bytes(old) for old in folder.glob("weights-*"))
        need = max(0, 2 * weights - left)
        yield Need(folder, f"weights for servers, twice {_size(weights)}", need, need)
    if config.logging.record_batches_every:
        kept = steps // config.logging.record_batches_every
        size = kept * most_batch_bytes(config)
        yield Need(output, f"{kept} batches, at most {_size(size)}", size, 0, certain=False)
    if config.logging.rollouts_every:
        rollout = config.rollout
        responses = rollout.prompts_per_step * rollout.samples_per_prompt
        size = (steps // config.logging.rollouts_every) * responses * rollout.max_new_tokens * _TEXT_BYTES
        yield Need(output, f"responses, at most {_size(size)}", size, 0, certain=False)


def most_batch_bytes(config: RunConfig) -> int:
    """Of a recorded batch of the longest responses: ids, log-probs and text; without experts and sets of tokens."""
    rollout = config.rollout
    tokens = config.data.max_prompt_tokens * _ID_BYTES + rollout.max_new_tokens * (
        2 * _ID_BYTES + _TEXT_BYTES
    )
    return rollout.prompts_per_step * rollout.samples_per_prompt * tokens


def _finding(needs: list[Need]) -> Finding:
    place = existing_part(needs[0].folder)
    free = shutil.disk_usage(place).free
    certain = sum(need.most for need in needs if need.certain)
    everything = sum(need.most for need in needs)
    first = sum(need.first for need in needs)
    what = ", ".join(need.what for need in needs)
    text = f"{place}: {_size(free)} free; the run writes {what}"
    cure = "free space, or lower checkpoint.keep_last, raise checkpoint.every, or set checkpoint.folder to another disk"
    if first * (1 + _SPARE) > free:
        return Finding(
            _DISKS, "error", f"{text}; {_size(first)} are needed for the first of each, so that nothing could be saved",
            (), cure,
        )  # fmt: skip
    if certain * (1 + _SPARE) > free:
        return Finding(_DISKS, "warning", f"{text}; together {_size(certain)}, more than there is", (), cure)
    if everything * (1 + _SPARE) > free:
        return Finding(
            _DISKS, "note", f"{text}; together up to {_size(everything)}, if every response is the longest",
            (), "raise logging.rollouts_every, or keep an eye on it",
        )  # fmt: skip
    return Finding(_DISKS, "ok", text)


def existing_part(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        total += sum(os.lstat(os.path.join(root, name)).st_size for name in files)
    return total


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
