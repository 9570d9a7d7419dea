"""What a run leaves in its output folder, and so what else is in one: nothing of somebody else's is moved aside."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from megatron_laser.config import ConfigError
from megatron_laser.files import LOCK
from megatron_laser.trainer.checkpoint.ownership import RUN

_FIRST = (LOCK, "config.yaml", "status.json", "owner.json", ".*.tmp")
"""What a start leaves that ended before run.json was written, beside empty folders."""
_FILES = (
    *(
        RUN,
        "metrics.jsonl",
        "events.jsonl",
        "timeline.jsonl",
        "held_responses.npz",
        "wandb_id.txt",
        "best.json",
    ),
    *("FINISHED", "STOPPED", "report.md", "predicted.json"),
)
_FOLDERS = (
    *("checkpoints", "rollouts", "batches", "bad_steps", "evaluation", "tensorboard", "wandb", "hf", "hf_*"),
    *(
        "weights",
        "servers",
        "control",
        "profile",
        "plots",
        "moved_aside",
        ".weight_groups",
        "best",
        "exports",
    ),
    *("step_*", "old-*", "weights-*", "*.aside"),
)
_LOGS = ("*.log", "*.out", "*.err", "report*.md", "*.png")
"""What people keep in a run's folder themselves."""
_NAMED = 8


def foreign(folder: Path) -> list[str]:
    """Names in an output folder that no run of ours would have left there, sorted; [] where there is no folder."""
    if not folder.is_dir():
        return []
    paths = sorted(folder.iterdir())
    if not (folder / RUN).is_file():
        started = {path.name for path in paths} & {LOCK}
        return [path.name for path in paths if not _of_a_start(path, bool(started))]
    return [path.name for path in paths if not _own(path)]


def check_own(folder: Path) -> None:
    """Refuse to move `folder` aside unless it is a run's.

    Raises:
        ConfigError: what is in it besides, and what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError([f"--overwrite: run.output_dir {folder} is a file; choose another run.output_dir"])
    found = foreign(folder)
    if not found:
        return
    named = ", ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
    why = "holds more than a run" if (folder / RUN).is_file() else f"is no run's folder (no {RUN})"
    raise ConfigError(
        [
            f"--overwrite: run.output_dir {folder} {why}: {named} {'is' if len(found) == 1 else 'are'} not moved "
            "aside; choose another run.output_dir, or move by hand what is yours"
        ]
    )


def _own(path: Path) -> bool:
    names = _FOLDERS if path.is_dir() else (*_FIRST, *_FILES, *_LOGS)
    return any(fnmatch(path.name, name) for name in names)


def _of_a_start(path: Path, started: bool) -> bool:
    """Of one that was cut off; `started`: a run's lock is there, so that metrics are those of a run."""
    if path.is_dir():
        known = any(fnmatch(path.name, name) for name in _FOLDERS)
        return known and (started or not any(inner.name not in _FIRST for inner in path.iterdir()))
    return any(fnmatch(path.name, name) for name in (*_FIRST, *((*_FILES, *_LOGS) if started else ())))
