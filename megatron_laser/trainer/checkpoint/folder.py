"""Checkpoint folders: names, atomic publication, verification, retention. Files only, no torch.

    <root>/step_00000120/          published: complete, listed with checksums in manifest.json
    <root>/step_00000140.partial/  being written, or left behind by a killed run; never read

A folder is published by one rename after every file is written and synced, so a kill at any moment leaves the
last published checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from megatron_laser.config.schema.root import RunConfig
from megatron_laser.errors import UserError
from megatron_laser.files import remove, replace_folder

FORMAT_VERSION = 1
_STATE = "state.json"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")
_READ_BYTES = 1 << 22


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used (of another run, damaged, of a newer format) or could not be written."""


def checkpoint_root(config: RunConfig) -> Path:
    """The folder that a run's checkpoints lie in."""
    return Path(config.checkpoint.folder or Path(config.run.output_dir) / "checkpoints")


def partial_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is published."""
    return root / f"step_{step:08d}.partial"


def published(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all published checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((step, path) for step, path in found if (path / _STATE).is_file())


def digests(folder: Path, prefix: str) -> dict[str, list[Any]]:
    """{file: [bytes, sha256]} of the files in `folder` whose names start with `prefix`."""
    return {
        path.name: [path.stat().st_size, _sha256(path)]
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name.startswith(prefix)
    }


def sync_files(paths: Iterable[Path]) -> None:
    """Bring the files' bytes to the disk: a rename must not survive a power failure that they do not."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def publish(partial: Path, state: dict[str, Any], files: dict[str, list[Any]]) -> Path:
    """Add state and manifest to a complete partial folder and rename it; returns the published folder."""
    write_synced(partial / _STATE, {"format_version": FORMAT_VERSION, **state})
    write_synced(partial / _MANIFEST, files | digests(partial, _STATE))
    _sync_folder(partial)
    target = partial.with_name(partial.name.removesuffix(".partial"))
    replaced = partial.with_name(f"{target.name}.replaced.partial")
    replace_folder(
        partial, target, aside=replaced
    )  # it is there after an older checkpoint was chosen by hand
    _sync_folder(target.parent)
    return target


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a published checkpoint. Raises CheckpointError when unreadable or of a newer format."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        version = int(state["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: {_STATE} cannot be read ({type(error).__name__}: {error}){_advice(folder)}"
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {folder} has format {version}, this version of megatron_laser reads up to "
            f"{FORMAT_VERSION}; upgrade megatron_laser"
        )
    return state


def listed_files(folder: Path) -> dict[str, list[Any]]:
    """{file: [bytes, sha256]} as the manifest has it. Raises CheckpointError when it cannot be read."""
    try:
        files: dict[str, list[Any]] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: {_MANIFEST} cannot be read ({error}){_advice(folder)}"
        ) from error
    return files


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Compare files with the manifest; several processes may each take a part of them.

    Raises CheckpointError naming the file that is missing or damaged.
    """
    files = listed_files(folder)
    for name in sorted(files)[part::parts]:
        size, sha256 = files[name]
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder}: {name} is missing{_advice(folder)}")
        if path.stat().st_size != size or _sha256(path) != sha256:
            raise CheckpointError(
                f"checkpoint {folder}: {name} is damaged (its bytes differ from those that were written)"
                f"{_advice(folder)}"
            )


def retain(root: Path, *, keep_last: int, keep_every: int, pinned: Collection[int] = ()) -> list[Path]:
    """Delete old checkpoints but the `keep_last` newest, those at multiples of `keep_every` (0: none) and of `pinned`.

    Returns what was deleted.
    """
    found = published(root)
    kept = {step for step, _ in found[-keep_last:]}.union(pinned)
    doomed = [
        path for step, path in found if step not in kept and not (keep_every and step % keep_every == 0)
    ]
    for path in doomed:
        # Renamed first: a half-deleted folder must not look published.
        gone = path.with_name(path.name + ".partial")
        remove(gone)
        os.replace(path, gone)
        remove(gone)
    return doomed


def remove_partials(root: Path) -> None:
    """Delete what killed runs left behind."""
    if root.is_dir():
        for path in root.glob("step_*.partial"):
            remove(path)


def _advice(folder: Path) -> str:
    older = [path.name for _, path in published(folder.parent) if path.name < folder.name]
    if older:
        return f"; delete {folder} to continue from {older[-1]}"
    return f"; no older checkpoint is left: delete {folder} to start from the beginning"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_synced(path: Path, value: Any) -> None:
    """Write `value` as JSON and bring it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
