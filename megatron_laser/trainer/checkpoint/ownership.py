"""Whose checkpoints a folder holds: said in the folder and in every checkpoint, checked before a run starts.

A run gets an id when its output folder is first claimed. A folder of checkpoints is the run's whose id is in its
run.json. Checkpoints that `convert` made belong to nobody yet, and those of earlier versions name nobody: they are
taken for the run's if they lie in its output folder, or if the output folder is as old as they are.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config import ConfigError
from megatron_laser.files import write_atomically
from megatron_laser.observability.run_record import RUN as RUN
from megatron_laser.trainer.checkpoint import folder as folders

OWNER = "owner.json"  # in the folder of checkpoints


@dataclass(frozen=True)
class Owner:
    """A run, as its checkpoints name it.

    id: of the run, for good. output_dir: where it wrote when it saved; folder: where its checkpoints lay then.
    """

    id: str
    output_dir: str
    folder: str


def read_owner(root: Path) -> Owner | None:
    """Who has claimed the folder `root`; else whose its newest checkpoint is; None when neither says.

    Raises:
        ConfigError: the record cannot be read. CheckpointError: the newest checkpoint's state cannot.
    """
    file = root / OWNER
    if file.exists():
        try:
            return Owner(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                [
                    f"{file}, which names the run that the checkpoints belong to, cannot be read ({error!r}); "
                    "delete it if they are this run's"
                ]
            ) from error
    found = folders.published(root)
    return owner_in(folders.read_state(found[-1][1])) if found else None


def owner_in(state: dict[str, Any]) -> Owner | None:
    """Whom a checkpoint's state names."""
    named = (state.get("run") or {}).get("owner")
    return Owner(**named) if named else None


def write_owner(root: Path, owner: Owner) -> None:
    """Say in `root` whose it is."""
    write_atomically(root / OWNER, json.dumps(asdict(owner), indent=1) + "\n")


def check_owner(root: Path, owner: Owner, *, earlier: bool) -> None:
    """Refuse the checkpoints in `root` if they are another run's than `owner`.

    Args:
        earlier: the output folder holds a run of an earlier version, whose checkpoints name nobody.

    Raises:
        ConfigError: whose they are, and what to do. CheckpointError: the newest one cannot be read.
    """
    there = read_owner(root)
    if there is not None and there.id != owner.id and same_folder(there.output_dir, owner.output_dir):
        raise ConfigError(
            [
                f"checkpoint.folder {root} belongs to a run that was in run.output_dir {owner.output_dir} before; "
                "choose another checkpoint.folder, or pass --overwrite to move its checkpoints aside"
            ]
        )
    if there is not None and there.id != owner.id:
        raise ConfigError(
            [f"checkpoint.folder {root} belongs to another run, that of {there.output_dir}; {_WAYS}"]
        )
    if there is not None and _is_copy(there, owner):
        raise ConfigError(
            [
                f"checkpoint.folder {root} belongs to the run in {there.output_dir}, of which run.output_dir "
                f"{owner.output_dir} is a copy: the two would overwrite each other's checkpoints. Copy "
                f"{root} as well and name the copy as checkpoint.folder, or delete the run that is not needed"
            ]
        )
    found = folders.published(root)
    if not found:
        return
    newest = found[-1][1]
    state = folders.read_state(newest)
    saved_by = owner_in(state)
    if saved_by is not None and saved_by.id != owner.id:
        raise ConfigError(
            [f"checkpoint {newest} was saved by another run, that of {saved_by.output_dir}; {_WAYS}"]
        )
    converted = state.get("run") is None
    inside = Path(os.path.abspath(root)).is_relative_to(os.path.abspath(owner.output_dir))
    if saved_by is None and there is None and not (converted or earlier or inside):
        raise ConfigError(
            [
                f"checkpoint {newest} was saved by a run of an earlier version, and run.output_dir "
                f"{owner.output_dir} does not hold that run; {_WAYS}"
            ]
        )


def check_left_behind(before: str | None, root: Path, owner: Owner) -> None:
    """Refuse to begin anew when the run's checkpoints lie in `before`, which checkpoint.folder named until now.

    Raises:
        ConfigError: where they are and what to do.
    """
    if before is None or Path(before) == root or folders.published(root):
        return
    found = folders.published(Path(before))
    if not found:
        return
    there = read_owner(Path(before))
    if there is not None and there.id == owner.id:
        raise ConfigError(
            [
                f"checkpoint.folder {root} holds no checkpoint, and the run in {owner.output_dir} has saved "
                f"{found[-1][1]}: it would begin anew. Go on with checkpoint.folder={before}, or move the step "
                f"folders in it to {root}"
            ]
        )


def same_folder(one: str | Path, other: str | Path) -> bool:
    """Whether both names lead to the same place, which need not exist."""
    return os.path.realpath(one) == os.path.realpath(other)


def _is_copy(there: Owner, owner: Owner) -> bool:
    """Whether the same folder of checkpoints is claimed by two output folders with the same id."""
    other = Path(there.output_dir)
    if there.folder != owner.folder or not (other / RUN).is_file():
        return False  # the run was moved, or its checkpoints were copied along
    if same_folder(other, owner.output_dir):
        return False
    try:
        return bool(json.loads((other / RUN).read_text(encoding="utf-8")).get("id") == owner.id)
    except (OSError, ValueError, AttributeError):
        return False


_WAYS = (
    "choose another checkpoint.folder (null: the run's own, run.output_dir/checkpoints). To go on with that run, use "
    "its run.output_dir, or a copy of that whole folder (its run.json says which run it is); to start a new run from "
    "its weights, convert the checkpoint and name the Hugging Face folder as model.path"
)
