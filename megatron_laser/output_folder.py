"""The folder of a run: claimed before anything expensive, never shared by two runs."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from megatron_laser.config import ConfigError, RunConfig, resolved_yaml
from megatron_laser.trainer.checkpoint import folder as checkpoints

logger = logging.getLogger(__name__)

STOPPED = "STOPPED"
FINISHED = "FINISHED"
_IDENTITY = "run.json"
_LOCK = "run.lock"
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
    """

    def __init__(self, path: Path, lock: IO[str], *, finished: bool = False) -> None:
        self.path = path
        self.finished = finished
        self._lock = lock

    def mark_finished(self, step: int) -> None:
        """Say that everything is done and written: the same command will not start again."""
        checkpoints.write_synced(self.path / FINISHED, {"step": step})

    def release(self) -> None:
        """Let go of the folder; safe to call twice."""
        self._lock.close()


def claim_output_folder(config: RunConfig) -> ClaimedFolder:
    """Create `run.output_dir`, lock it, and write the resolved configuration and the run's identity into it.

    Raises:
        ConfigError: the folder is in use, belongs to another run, or cannot be written.
    """
    folder = Path(config.run.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        _check_same_run(config, folder)
        finished = _finished_step(folder)
        if finished is not None and config.run.steps <= finished:
            logger.warning(
                "the run in %s has finished its %d steps: nothing to do. Raise run.steps to train on, or choose "
                "another run.output_dir",
                folder,
                finished,
            )
            return ClaimedFolder(folder, lock, finished=True)
        if finished is not None:
            _check_continues(config, folder, finished)
            (folder / FINISHED).unlink()
        (folder / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
        if not (folder / _IDENTITY).exists():
            record = {
                "name": config.run.name,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "settings": identity(config),
            }
            (folder / _IDENTITY).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / STOPPED).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError([f"run.output_dir {folder} cannot be written: {error}"]) from error
    return ClaimedFolder(folder, lock)


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


def move_aside(folder: Path) -> Path | None:
    """Rename an existing output folder to `<folder>.old-N`; returns the new name, None if there was none.

    Raises:
        ConfigError: a live run writes into it.
    """
    if not folder.exists():
        return None
    _lock(folder).close()
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.replace(folder, target)
    return target


def _lock(folder: Path) -> IO[str]:
    lock = (folder / _LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise ConfigError(
            [
                f"run.output_dir {folder} is in use by a live run{f' ({owner})' if owner else ''}; stop it or "
                "choose another run.output_dir"
            ]
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        logger.warning(
            "run.output_dir %s: no file locks here (%s); never start two runs in it", folder, error
        )
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


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
    root = Path(config.checkpoint.folder or folder / "checkpoints")
    if not checkpoints.published(root):
        raise ConfigError(
            [
                f"run.output_dir {folder} holds a finished run of {finished} steps and {root} no checkpoint to go on "
                f"from to run.steps {config.run.steps}; {_WAYS}"
            ]
        )


def _check_same_run(config: RunConfig, folder: Path) -> None:
    file = folder / _IDENTITY
    if not file.exists():
        if (folder / "metrics.jsonl").exists():
            raise ConfigError(
                [f"run.output_dir {folder} holds metrics of an unknown run (no {_IDENTITY}); {_WAYS}"]
            )
        return
    if config.run.resume == "never":
        raise ConfigError([f"run.output_dir {folder} already holds a run and run.resume is never; {_WAYS}"])
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))["settings"]
        # What an earlier version wrote down may be free to change by now.
        theirs = {key: value for key, value in recorded.items() if not _may_change(*key.split(".", 1))}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError([f"{file} cannot be read ({error!r}); {_WAYS}"]) from error
    ours = identity(config)
    changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if changed:
        listed = ", ".join(
            f"{key} {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in changed[:5]
        )
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ConfigError([f"run.output_dir {folder} belongs to another run: {listed}{more}; {_WAYS}"])


_WAYS = "choose another run.output_dir, or pass --overwrite to move the old folder aside"
