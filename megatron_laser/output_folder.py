"""The folder of a run: claimed before anything expensive, never shared by two runs."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from megatron_laser.config import ConfigError, RunConfig, resolved_yaml

STOPPED = "STOPPED"
_IDENTITY = "run.json"
_LOCK = "run.lock"
# What may change between the start of a run and its continuation: it decides where and how fast things run,
# how long and how talkative, but not what is learned from which data.
_MAY_CHANGE = {
    "parallel": None,
    "batching": None,
    "checkpoint": None,
    "logging": None,
    "evaluation": None,
    "run": {"name", "steps", "output_dir", "resume", "deadline", "start_grace"},
    "rollout": {"deadline"},
    "reward": {"workers", "deadline"},
    "optimizer": {"distributed", "overlap_grad_reduce", "overlap_param_gather"},
    "data": {"validation", "test"},
}


class ClaimedFolder:
    """The right to write into `path`; held until `release` or the end of the process."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock

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
        lock = (folder / _LOCK).open("w", encoding="utf-8")
        _lock(lock, folder)
        _check_same_run(config, folder)
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
        free = _MAY_CHANGE.get(section, set())
        for key, value in keys.items():
            if free is not None and key not in free:
                settings[f"{section}.{key}"] = value
    return settings


def move_aside(folder: Path) -> Path | None:
    """Rename an existing output folder to `<folder>.old-N`; returns the new name, None if there was none."""
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.replace(folder, target)
    return target


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            [f"run.output_dir {folder} is in use by a live run; stop it or choose another run.output_dir"]
        ) from None


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
        theirs = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError) as error:
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
