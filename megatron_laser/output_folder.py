"""The folder of a run: claimed before anything expensive, never shared by two runs."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_laser.config import ConfigError, RunConfig, resolved_yaml
from megatron_laser.files import through_links
from megatron_laser.folder_lock import LOCK, lock_folder
from megatron_laser.observability.plain import write_atomically
from megatron_laser.trainer.checkpoint import folder as checkpoints
from megatron_laser.trainer.checkpoint import owner as owners
from megatron_laser.trainer.checkpoint.owner import RUN, Owner, same_folder

logger = logging.getLogger(__name__)

STOPPED = "STOPPED"
FINISHED = "FINISHED"
# What may change between the start of a run and its continuation: it decides where and how fast things run,
# how long and how talkative, but not what is learned from which data.
_MAY_CHANGE = {
    "model": {"recompute", "layers", "attention"},
    "parallel": None,
    "batching": None,
    "checkpoint": None,
    "logging": None,
    "evaluation": None,
    "run": {"name", "steps", "output_dir", "resume", "deadline", "start_grace", "max_bad_steps"},
    "policy": {"mismatch_abort"},
    "laser": {"max_unscored_steps"},
    "rollout": {
        *("deadline", "max_concurrency", "min_servers", "servers_deadline", "sglang"),
        *("weight_sync", "sync_folder", "sync_bucket_mib", "sync_flatten", "sync_deadline", "sync_address"),
        "verify_sync",
    },
    "reward": {"workers", "deadline"},
    "optimizer": {
        "distributed",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "gradient_accumulation_fusion",
    },
    "data": {"validation", "test"},
}


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

    def mark_finished(self, step: int) -> None:
        """Say that everything is done and written: the same command will not start again."""
        checkpoints.write_synced(self.path / FINISHED, {"step": step})

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
    setting, path = "run.output_dir", folder
    with ExitStack() as held:
        try:
            through_links(folder).mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(lock_folder(folder, setting))
            standing = check_output_folder(config, again)
            finished = standing.finished
            if finished is not None and config.run.steps <= finished:
                logger.warning(
                    "the run in %s has finished its %d steps: nothing to do. Raise run.steps to train on, or choose "
                    "another run.output_dir",
                    folder,
                    finished,
                )
                return ClaimedFolder(folder, lock, held.pop_all(), finished=True)
            for setting, path in also_written(config):
                through_links(path).mkdir(parents=True, exist_ok=True)
                held.enter_context(lock_folder(path, setting))
            owner = check_checkpoints(config, standing, again)
            owners.write_owner(checkpoints.checkpoint_root(config), owner)
            if finished is not None:
                (folder / FINISHED).unlink()
            (folder / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
            _write_record(config, folder, standing.record, owner)
            (folder / STOPPED).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError([f"{setting} {path} cannot be written: {error}"]) from error
        return ClaimedFolder(folder, lock, held.pop_all(), owner=owner)


@dataclass(frozen=True)
class Standing:
    """What an output folder holds of the run that is to write into it.

    record: of the run, None for a new one. finished: the steps after which it has finished, None if it has not.
    """

    record: dict[str, Any] | None
    finished: int | None


def check_output_folder(config: RunConfig, again: Owner | None = None) -> Standing:
    """Compare `run.output_dir`, which need not exist, with the run. Writes nothing.

    Args:
        again: the run, if it had claimed the folder before.

    Raises:
        ConfigError: it belongs to another run, or holds a finished one that cannot go on.
    """
    folder = Path(config.run.output_dir)
    record = _same_run(config, folder, again)
    finished = _finished_step(folder)
    if finished is not None and config.run.steps > finished:
        _check_continues(config, folder, finished)
    return Standing(record, finished)


def check_checkpoints(config: RunConfig, standing: Standing, again: Owner | None = None) -> Owner:
    """The run as its checkpoints name it, once the folder of its checkpoints is known to be its own. Writes nothing.

    Raises:
        ConfigError: the folder is another run's. CheckpointError: the newest checkpoint cannot be read.
    """
    record = standing.record
    root = checkpoints.checkpoint_root(config)
    output_dir = str(config.run.output_dir)
    run_id = again.id if again is not None else None if record is None else record.get("id")
    if run_id is None:  # a new run, or one of an earlier version, which gave runs no id
        there = owners.read_owner(root)
        nothing_to_lose = record is not None or not checkpoints.published(root)
        if there is not None and same_folder(there.output_dir, output_dir) and nothing_to_lose:
            run_id = there.id  # a start that was cut off had given it one already
    owner = Owner(run_id or uuid.uuid4().hex, output_dir, str(root))
    owners.check_owner(root, owner, earlier=record is not None and "id" not in record)
    owners.check_left_behind(None if record is None else record.get("checkpoints"), root, owner)
    return owner


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


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run this run, as {"section.key": value}."""
    settings = {}
    for section, keys in config.model_dump(mode="json").items():
        for key, value in keys.items():
            if not _may_change(section, key):
                settings[f"{section}.{key}"] = value
    return settings


def _may_change(section: str, key: str) -> bool:
    free = _MAY_CHANGE.get(section, set())
    return free is None or key in free


def _finished_step(folder: Path) -> int | None:
    file = folder / FINISHED
    if not file.exists():
        return None
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{file} cannot be read ({error!r}); delete it to go on with the run"]) from error


def _check_continues(config: RunConfig, folder: Path, finished: int) -> None:
    """Without a checkpoint a finished run would begin anew and overwrite what it has measured."""
    root = checkpoints.checkpoint_root(config)
    if not checkpoints.published(root):
        raise ConfigError(
            [
                f"run.output_dir {folder} holds a finished run of {finished} steps and {root} no checkpoint to go on "
                f"from to run.steps {config.run.steps}; {_WAYS}"
            ]
        )


def _same_run(config: RunConfig, folder: Path, again: Owner | None) -> dict[str, Any] | None:
    """The record of the run in `folder`, which is the one of `config`; None when there is none."""
    file = folder / RUN
    if not file.exists():
        if (folder / "metrics.jsonl").exists():
            raise ConfigError(
                [f"run.output_dir {folder} holds metrics of an unknown run (no {RUN}); {_WAYS}"]
            )
        return None
    if config.run.resume == "never" and again is None:
        raise ConfigError([f"run.output_dir {folder} already holds a run and run.resume is never; {_WAYS}"])
    record = read_record(folder)
    # What an earlier version wrote down may be free to change by now.
    theirs = {key: value for key, value in record["settings"].items() if not _may_change(*key.split(".", 1))}
    ours = identity(config)
    changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if changed:
        listed = ", ".join(
            f"{key} {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in changed[:5]
        )
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ConfigError([f"run.output_dir {folder} belongs to another run: {listed}{more}; {_WAYS}"])
    if again is not None and record.get("id") != again.id:
        raise ConfigError(
            [f"run.output_dir {folder} was deleted under a live run, and holds another one by now"]
        )
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """What an output folder says of its run: name, started, settings, id, checkpoints.

    Raises:
        ConfigError: it cannot be read.
    """
    file = folder / RUN
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        for key in record["settings"]:
            _section, _key = key.split(".", 1)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError([f"{file} cannot be read ({error!r}); {_WAYS}"]) from error
    return dict(record)


_WAYS = "choose another run.output_dir, or pass --overwrite to move the old folder aside"
