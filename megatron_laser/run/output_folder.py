"""The folder of a run: claimed before anything expensive, never shared by two runs."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_laser.config import ConfigError, RunConfig, resolved_yaml
from megatron_laser.files import LOCK, lock_folder, through_links, write_atomically
from megatron_laser.run.output_checks import FINISHED as FINISHED
from megatron_laser.run.output_checks import (
    check_checkpoints,
    check_output_folder,
    early_end,
    identity,
    read_record,
)
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
    owner: the run, for its checkpoints; None when it is finished.
    """

    def __init__(
        self,
        path: Path,
        lock: IO[str],
        held: ExitStack,
        *,
        owner: Owner | None = None,
        finished: bool = False,
    ) -> None:
        self.path = path
        self.owner = owner
        self.finished = finished
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


def claim_output_folder(config: RunConfig, *, again: Owner | None = None) -> ClaimedFolder:
    """Create `run.output_dir`, lock it, and write the resolved configuration and the run's identity into it.

    The folder of its checkpoints, and one that its weights pass through on the way to servers, are locked as well.

    Args:
        again: the run, if it had claimed the folder before.

    Raises:
        ConfigError: a folder is in use, belongs to another run, or cannot be written.
        CheckpointError: the newest checkpoint cannot be read.
    """
    folder = Path(config.run.output_dir)
    root = checkpoints.checkpoint_root(config)
    with ExitStack() as held:
        with _writing("run.output_dir", folder):
            through_links(folder).mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(lock_folder(folder, "run.output_dir"))
            state = check_output_folder(config, again)
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
            return ClaimedFolder(folder, lock, held.pop_all(), finished=True)
        for setting, path in also_written(config):
            with _writing(setting, path):
                through_links(path).mkdir(parents=True, exist_ok=True)
                held.enter_context(lock_folder(path, setting))
        with _writing("checkpoint.folder", root):
            owner = check_checkpoints(config, state, again)
            ownership.write_owner(root, owner)
        with _writing("run.output_dir", folder):
            if finished is not None:
                (folder / FINISHED).unlink()
            (folder / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
            _write_record(config, folder, state.record, owner)
            (folder / STOPPED).unlink(missing_ok=True)
        return ClaimedFolder(folder, lock, held.pop_all(), owner=owner)


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


def _write_record(config: RunConfig, folder: Path, record: dict[str, Any] | None, owner: Owner) -> None:
    if record is None:
        record = {
            "name": config.run.name,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "settings": identity(config),
        }
    written = {"id": owner.id, **record, "checkpoints": owner.folder}
    write_atomically(folder / RUN, json.dumps(written, indent=1) + "\n")


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
