"""The folder of a run: claimed before anything expensive, never shared by two runs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_laser.config import ConfigError, RunConfig, resolved_yaml
from megatron_laser.files import LOCK, lock_folder, through_links, write_atomically
from megatron_laser.observability.quantities import utc_now
from megatron_laser.observability.run_record import Change, changes_in
from megatron_laser.run.branching import begin_branch
from megatron_laser.run.compared_settings import settings_of
from megatron_laser.run.going_back import move_later_aside
from megatron_laser.run.moved_paths import contents
from megatron_laser.run.output_checks import FINISHED as FINISHED
from megatron_laser.run.output_checks import (
    OutputState,
    check_checkpoints,
    check_new,
    check_output_folder,
    early_end,
    read_record,
)
from megatron_laser.run.own_files import check_own
from megatron_laser.trainer.checkpoint import folder as checkpoints
from megatron_laser.trainer.checkpoint import ownership
from megatron_laser.trainer.checkpoint.best import LINK
from megatron_laser.trainer.checkpoint.folder import checkpoint_root
from megatron_laser.trainer.checkpoint.ownership import (
    OWNER,
    RUN,
    Owner,
    check_owner,
    read_owner,
    same_folder,
)

logger = logging.getLogger(__name__)

STOPPED = "STOPPED"


class ClaimedFolder:
    """The right to write into `path`; held until `release` or the end of the process.

    finished: the run in it has done all of `run.steps`, and there is nothing left to do.
    owner: the run, for its checkpoints; None when it is finished. changes: settings that it has otherwise since this
    start. moved: what `--overwrite` moved. told: what else somebody should know, a sentence each.
    """

    def __init__(
        self,
        path: Path,
        lock: IO[str],
        held: ExitStack,
        *,
        owner: Owner | None = None,
        finished: bool = False,
        changes: Sequence[Change] = (),
        moved: Sequence[Moved] = (),
        told: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.owner = owner
        self.finished = finished
        self.changes = tuple(changes)
        self.moved = tuple(moved)
        self.told = tuple(told)
        self._lock = lock
        self._held = held

    def mark_finished(self, step: int, early: RunConfig | None = None) -> None:
        """Say that everything is done and written: the same command will not start again.

        Args: early: the settings, where they have ended the run before `run.steps`.
        """
        ended = {} if early is None else early_end(early)
        checkpoints.write_synced(self.path / FINISHED, {"step": step} | ended)

    def intact(self) -> bool:
        """Whether the folder is still the one that was claimed, and not deleted, moved or replaced."""
        try:
            return os.path.samestat(os.stat(self.path / LOCK), os.fstat(self._lock.fileno()))
        except OSError:
            return False

    def restore(self, config: RunConfig) -> None:
        """Claim the folder's place again, as the same run, so that it can save and go on later.

        Raises:
            ConfigError: another run is there by now, or it cannot be written.
        """
        self.release()
        again = claim_output_folder(config, again=self.owner)
        self._lock, self._held = again._lock, again._held

    def release(self) -> None:
        """Let go of the folder; safe to call twice."""
        self._held.close()


def claim_output_folder(
    config: RunConfig,
    *,
    again: Owner | None = None,
    change: bool = False,
    overwrite: bool = False,
    data_fingerprints: Sequence[str] = (),
) -> ClaimedFolder:
    """Create `run.output_dir`, lock it, and write the resolved configuration and the run's record into it.

    The folder of its checkpoints, and one that its weights pass through on the way to servers, are locked as well.
    Where `run.resume` asks for it, the run goes back to an earlier checkpoint, or a branch is begun.

    Args:
        again: the run, if it had claimed the folder before.
        change: it may go on with other settings of what is learned.
        overwrite: move a run that is there aside, once nothing else is in the way, and begin anew.
        data_fingerprints: of the sources of `data.train`, where they are known.

    Raises:
        ConfigError: a folder is in use, belongs to another run, or cannot be written.
        CheckpointError: the newest checkpoint cannot be read.
    """
    folder = Path(config.run.output_dir)
    moved = move_aside(config) if overwrite else []
    root = checkpoints.checkpoint_root(config)
    with ExitStack() as held:
        with _writing("run.output_dir", folder):
            through_links(folder).mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(lock_folder(folder, "run.output_dir"))
            state = check_output_folder(config, again, change=change)
        finished = state.finished
        if state.is_done(config.run.steps):
            if state.planned is None:
                logger.warning(
                    "the run in %s has finished its %d steps: nothing to do. Raise run.steps to train on, or choose "
                    "another run.output_dir",
                    *(folder, finished),
                )
            else:
                logger.warning(
                    "the run in %s has finished early, after step %d of %d: nothing to do. Change run.early_stop to "
                    "train on, or choose another run.output_dir",
                    *(folder, finished, state.planned),
                )
            return ClaimedFolder(folder, lock, held.pop_all(), finished=True, moved=moved)
        for setting, path in also_written(config):
            with _writing(setting, path):
                through_links(path).mkdir(parents=True, exist_ok=True)
                held.enter_context(lock_folder(path, setting))
        with _writing("checkpoint.folder", root):
            owner = check_checkpoints(config, state, again)
            ownership.write_owner(root, owner)
        told = []
        with _writing("run.output_dir", folder):
            if state.back_to is not None:
                aside = move_later_aside(folder, root, state.back_to)
                told.append(f"goes back to step {state.back_to}: what came after it is in {aside}")
            if finished is not None:
                (folder / FINISHED).unlink()
            (folder / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
            _write_record(config, folder, state, owner, data_fingerprints)
            (folder / STOPPED).unlink(missing_ok=True)
        if state.branch is not None:
            with _writing("run.output_dir", folder):
                begin_branch(state.branch, folder, root, owner)
        return ClaimedFolder(
            folder, lock, held.pop_all(), owner=owner, changes=state.changes, moved=moved, told=told
        )


@contextmanager
def _writing(setting: str, path: Path) -> Iterator[None]:
    """An OSError inside is said of the folder that `setting` names."""
    try:
        yield
    except OSError as error:
        raise ConfigError([f"{setting} {path} cannot be written: {error}"]) from error


def also_written(config: RunConfig) -> list[tuple[str, Path]]:
    """(setting, folder) of the folders that two runs must not share, besides the output folder."""
    found = [("checkpoint.folder", checkpoints.checkpoint_root(config))]
    rollout = config.rollout
    if rollout.weight_sync == "disk" and rollout.sync_folder is not None:
        found.append(("rollout.sync_folder", Path(rollout.sync_folder)))  # a run deletes older weights there
    seen = {os.path.realpath(config.run.output_dir)}
    different = []
    for setting, path in found:
        if os.path.realpath(path) not in seen:
            different.append((setting, path))
        seen.add(os.path.realpath(path))
    return different


def _write_record(
    config: RunConfig, folder: Path, state: OutputState, owner: Owner, data_fingerprints: Sequence[str]
) -> None:
    """run.json: whose folder it is, its settings, and what was changed since when.

    Settings of changes are kept twice: `changes` for people, as what they come to; `undo` as they were written, so that
    the run can be compared with a checkpoint from before. Those behind the checkpoint that the run goes on from are
    dropped: they have been undone with the steps that they were for.
    """
    began = {
        "name": config.run.name,
        "started": utc_now(),
    }
    record = dict(state.record or began)
    before, step = record, state.step or 0
    if state.branch is not None:
        before = dict(state.branch.record)
        named = {"asked": config.run.resume, "checkpoint": str(state.branch.checkpoint)}
        record["branched_from"] = state.branch.to_json() | named
    changes = [one for one in changes_in(before) if one.step <= step]
    undo = [one for one in before.get("undo", ()) if int(one["step"]) <= step]
    if state.before:
        undo.append({"step": step + 1, "settings": state.before})
    if state.back_to is not None:
        record["went_back"] = config.run.resume
    elif config.run.resume != record.get("went_back"):
        record.pop("went_back", None)
    # Of what a checkpoint's state is bound to the first start tells, whatever lies there by now.
    known = before.get("contents") or {}
    kept = {key: known[key] for key in ("model.path", "data.train", "run.batches") if key in known}
    written = {
        "id": owner.id,
        **record,
        "settings": settings_of(config),
        "changes": [one.to_json() for one in (*changes, *state.changes)],
        "undo": undo,
        "contents": contents(config, data_fingerprints) | kept,
        "checkpoints": owner.folder,
    }
    write_atomically(folder / RUN, json.dumps(written, indent=1) + "\n")


@dataclass(frozen=True)
class Moved:
    """What `--overwrite` moved, in words, and where to."""

    what: str
    to: Path


def move_aside(config: RunConfig) -> list[Moved]:
    """Make room for a new run: rename the output folder to `<folder>.old-N`.

    Checkpoints of that run in a `checkpoint.folder` elsewhere go to `old-N` in it. Whatever would keep the new run from
    claiming its folders is looked for first.

    Raises:
        ConfigError: something in the folder is no run's; a live run writes into one of the run's folders; the
            checkpoints are another run's; `run.resume` goes on from what would be moved; or moving fails.
    """
    folder = Path(config.run.output_dir)
    check_own(folder)
    check_new(config)
    moved: list[Moved] = []
    try:
        with ExitStack() as held:
            if folder.exists():
                held.enter_context(lock_folder(folder, "run.output_dir"))
            for setting, path in also_written(config):
                _check_free(setting, path)
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


def _check_free(setting: str, path: Path) -> None:
    """Whether a folder that the new run locks, too, can be locked. Raises ConfigError."""
    if path.is_dir():
        with _writing(setting, path), lock_folder(path, setting):
            pass


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
    entries = [path for path in root.iterdir() if path.name.startswith("step_") or path.name in (OWNER, LINK)]
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
