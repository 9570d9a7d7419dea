"""What a run writes, by file system, and whether there is room for it. Sizes follow from the configuration alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_laser.config import RunConfig, count_parameters, read_architecture
from megatron_laser.config.model_folder.parameters import rank_bytes
from megatron_laser.errors import Finding

TOPIC = "disk space"
_TEXT_BYTES = 4  # of a token as text, about
_SPARE = 0.02  # of the need: folders, metrics, logs


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
        kept = min(saved, for_good + min(settings.keep_last, saved) + 1)
        yield Need(
            root,
            f"{kept} checkpoints of {_size(checkpoint)}"
            if kept > 1
            else f"a checkpoint of {_size(checkpoint)}",
            max(0, kept * checkpoint - sum(map(_folder_bytes, there))),
            0 if there else checkpoint,
        )
    if settings.export_hf:
        yield Need(output, f"the export to hf/ of {_size(weights)}", weights, weights)
    if config.rollout.engine == "sglang" and config.rollout.weight_sync == "disk":
        folder = Path(config.rollout.sync_folder or output / "weights")
        moved = overwrite and config.rollout.sync_folder is None
        # the first new ones replace them
        left = 0 if moved else sum(_folder_bytes(old) for old in folder.glob("weights-*"))
        need = max(0, 2 * weights - left)
        yield Need(folder, f"weights for servers, twice {_size(weights)}", need, need)
    if config.logging.rollouts_every:
        rollout = config.rollout
        responses = rollout.prompts_per_step * rollout.samples_per_prompt
        size = (steps // config.logging.rollouts_every) * responses * rollout.max_new_tokens * _TEXT_BYTES
        yield Need(output, f"responses, at most {_size(size)}", size, 0, certain=False)


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
            TOPIC, "error", f"{text}; {_size(first)} are needed for the first of each, so that nothing could be saved",
            (), cure,
        )  # fmt: skip
    if certain * (1 + _SPARE) > free:
        return Finding(TOPIC, "warning", f"{text}; together {_size(certain)}, more than there is", (), cure)
    if everything * (1 + _SPARE) > free:
        return Finding(
            TOPIC, "note", f"{text}; together up to {_size(everything)}, if every response is the longest",
            (), "raise logging.rollouts_every, or keep an eye on it",
        )  # fmt: skip
    return Finding(TOPIC, "ok", text)


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
