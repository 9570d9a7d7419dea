"""A branch: a run of its own that begins with the state of another run's checkpoint. The other run is only read.

The other run may train meanwhile. Files of its checkpoint are linked where both folders are on one file system, and
copied elsewhere, so that the branch keeps them when the other run deletes its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.config.schema.system import RESUME_STEP
from megatron_laser.files import remove, write_atomically
from megatron_laser.observability.run_record import read_run_record
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint.ownership import RUN, Owner, owner_in, read_owner, same_folder

_STEP_FOLDER = re.compile(r"step_(\d+)")
_STEP_FILE = re.compile(r"_step_(\d+)\.jsonl?")
_LINES = ("metrics.jsonl", "events.jsonl", "timeline.jsonl")
_WHOLE = ("held_responses.npz",)


@dataclass(frozen=True)
class Origin:
    """What a branch begins with.

    folder: of the other run. checkpoint: of it. record: the other run's run.json.
    """

    folder: Path
    checkpoint: Path
    step: int
    record: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As run.json of the branch has it."""
        return {"folder": str(self.folder), "step": self.step, "id": self.record.get("id")}


def resume_step(config: RunConfig) -> int | None:
    """N of `run.resume: step N`."""
    match = RESUME_STEP.fullmatch(config.run.resume)
    return None if match is None else int(match[1])


def resume_folder(config: RunConfig) -> Path | None:
    """What `run.resume` names, where it asks for a branch."""
    words = config.run.resume in ("auto", "never") or resume_step(config) is not None
    return None if words else Path(config.run.resume)


def is_branch_of(record: Mapping[str, Any], named: Path) -> bool:
    """Whether the run of `record` is the branch that `named` asks for: it goes on, and is not begun again."""
    before = record.get("branched_from") or {}
    asked = before.get("asked")
    return asked is not None and (asked == str(named) or same_folder(asked, named))


def find_origin(named: Path) -> Origin:
    """The checkpoint that `run.resume` names: one, or the newest of a run or of a folder of checkpoints. Reads only.

    Raises:
        ConfigError: there is none, or it is not of a run. CheckpointError: it cannot be read.
    """
    checkpoint = _checkpoint(named)
    state = folders.read_state(checkpoint)
    owner = owner_in(state) or read_owner(checkpoint.parent)
    places = [named, checkpoint.parent, checkpoint.parent.parent]
    if owner is not None:
        places += [Path(owner.output_dir)]
    for place in places:
        record = _record(place)
        if record is not None and (owner is None or record.get("id") in (None, owner.id)):
            return Origin(place, checkpoint, int(state["step"]), record)
    raise ConfigError(
        [
            f"run.resume {named}: {checkpoint} is of no run that is there ({RUN} is looked for in "
            f"{' and '.join(dict.fromkeys(map(str, places)))}); a branch needs the run's settings and metrics. To "
            "start from the weights alone, convert the checkpoint and name the Hugging Face folder as model.path"
        ]
    )


def _checkpoint(named: Path) -> Path:
    if not named.is_dir():
        name = _STEP_FOLDER.fullmatch(named.name)
        written = None if name is None else named.with_name(f"step_{int(name[1]):08d}")
        if written is not None and written.is_dir():  # as people write it, without the zeros
            return written
        there = folders.published(named.parent) if name is not None else []
        steps = (
            f"; {named.parent} has those of steps {', '.join(str(step) for step, _ in there)}"
            if there
            else ""
        )
        raise ConfigError(
            [
                f"run.resume {named}: there is no such folder{steps}. Expected auto, never, step N, or the folder of a "
                "run, of its checkpoints or of one of them"
            ]
        )
    if (named / "state.json").is_file():
        return named
    record = _record(named)
    roots = [named / "checkpoints", named]
    if record is not None and record.get("checkpoints"):
        # Behind those in the folder itself: of a run that was copied it is where the first one has its own.
        roots.append(Path(record["checkpoints"]))
    for root in roots:
        if found := folders.published(root):
            return found[-1][1]
    raise ConfigError(
        [f"run.resume {named}: no checkpoint is in {' or '.join(map(str, dict.fromkeys(roots)))}"]
    )


def _record(folder: Path) -> dict[str, Any] | None:
    record = read_run_record(folder)
    return record if isinstance(record.get("settings"), dict) else None


def begin_branch(origin: Origin, folder: Path, root: Path, owner: Owner) -> None:
    """Bring everything that the branch goes on from into its folders; may be called again after an interruption.

    Lines of metrics, events and timeline up to the checkpoint's step, evaluations up to it, and last the checkpoint.

    Raises:
        ConfigError: the other run deleted the checkpoint meanwhile. OSError.
    """
    for name in _LINES:
        lines = list(_lines(origin, name))
        if lines:
            write_atomically(folder / name, "".join(lines))
    for path in sorted((origin.folder / "evaluation").glob("*_step_*.json*")):
        match = _STEP_FILE.search(path.name)
        if match is not None and int(match[1]) <= origin.step and path.name.endswith((".json", ".jsonl")):
            write_atomically(folder / "evaluation" / path.name, path.read_bytes())
    for name in _WHOLE:
        if (origin.folder / name).exists():
            write_atomically(folder / name, (origin.folder / name).read_bytes())
    _take_checkpoint(origin, root, owner)


def _lines(origin: Origin, name: str) -> Iterator[str]:
    """Those of steps up to the checkpoint's; an event says whose it is."""
    file = origin.folder / name
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if int(entry["step"]) > origin.step:
                continue
        except (ValueError, KeyError, TypeError):
            continue  # a line that is being written, or a part of one
        if name == "events.jsonl":
            line = json.dumps({**entry, "run": entry.get("run", str(origin.folder))}, ensure_ascii=False)
        yield line + "\n"


def _take_checkpoint(origin: Origin, root: Path, owner: Owner) -> None:
    partial = folders.partial_folder(root, origin.step)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        state = folders.read_state(origin.checkpoint)
        files = folders.listed_files(origin.checkpoint)
        for name in files:
            if name != "state.json":
                _link(origin.checkpoint / name, partial / name)
    except FileNotFoundError as error:
        remove(partial)
        raise ConfigError(
            [
                f"run.resume {origin.checkpoint}: {error.filename} is gone; a run that trains deletes old checkpoints "
                "(checkpoint.keep_last, checkpoint.keep_every): name another one"
            ]
        ) from error
    state["run"] = {**(state.get("run") or {}), "owner": asdict(owner)}
    files.pop("state.json", None)
    folders.publish(partial, state, files)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        folders.sync_files([target])
