"""`train --overwrite`: the output folder's run, and its checkpoints elsewhere, make room for a new one."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.files import through_links
from megatron_laser.folder_lock import lock_folder
from megatron_laser.output_checks import read_record
from megatron_laser.trainer.checkpoint.folder import checkpoint_root
from megatron_laser.trainer.checkpoint.owner import OWNER, RUN, Owner, check_owner, read_owner, same_folder


@dataclass(frozen=True)
class Moved:
    """What `--overwrite` moved, in words, and where to."""

    what: str
    to: Path


def move_aside(config: RunConfig) -> list[Moved]:
    """Make room for a new run: rename the output folder to `<folder>.old-N`.

    Checkpoints of that run in a `checkpoint.folder` elsewhere go to `old-N` in it.

    Raises:
        ConfigError: a live run writes into one of them, the checkpoints are another run's, or moving fails.
    """
    folder = Path(config.run.output_dir)
    moved: list[Moved] = []
    try:
        with ExitStack() as held:
            if folder.exists():
                held.enter_context(lock_folder(folder, "run.output_dir"))
            moved += _checkpoints_aside(config, folder, held)
        if folder.exists():
            real = through_links(folder)  # a link stays where it is, and the new run goes through it
            target = _free_name(real.with_name(f"{real.name}.old-1"))
            os.replace(real, target)
            moved.append(Moved(str(folder), target))
    except OSError as error:
        raise ConfigError(
            [
                f"--overwrite: {folder} cannot be moved aside ({error}); move it by hand or choose another "
                "run.output_dir"
            ]
        ) from error
    return moved


def _checkpoints_aside(config: RunConfig, folder: Path, held: ExitStack) -> list[Moved]:
    root = checkpoint_root(config)
    inside = Path(os.path.abspath(root)).is_relative_to(os.path.abspath(folder))
    if inside or not root.is_dir():
        return []
    held.enter_context(lock_folder(root, "checkpoint.folder"))
    there = read_owner(root)
    if there is None and not (folder / RUN).exists():
        return []  # of nobody that is known: the claim says what to do about them
    run_id = _run_id(folder)
    own = there is None or there.id == run_id or same_folder(there.output_dir, folder)
    if not own:
        check_owner(root, Owner(run_id, str(folder), str(root)), earlier=False)
    entries = [path for path in root.iterdir() if path.name.startswith("step_") or path.name == OWNER]
    if not entries:
        return []
    target = _free_name(root / "old-1")
    target.mkdir()
    for path in entries:
        os.replace(path, target / path.name)
    return [Moved(f"checkpoints in {root}", target)]


def _run_id(folder: Path) -> str:
    """The id of the run in an output folder; "" where it has none, or no record that can be read."""
    try:
        return str(read_record(folder).get("id", ""))
    except (OSError, ConfigError):
        return ""


def _free_name(first: Path) -> Path:
    """`first`, which ends in 1, or the next number that is free."""
    stem, number = first.name.removesuffix("1"), 1
    while (target := first.with_name(f"{stem}{number}")).exists():
        number += 1
    return target
