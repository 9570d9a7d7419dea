"""`run.resume: step N`: the run goes back to a checkpoint of its own; what came after it is moved aside."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_laser.config import ConfigError
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint.best import BEST, HF_BEST, LINK, read_best, settle_best

ASIDE = "moved_aside"
_STEP = re.compile(r"(?:^|_)step_(\d+)")
_EXPORT = re.compile(r"hf_step_(\d+)")
_LINES = ("metrics.jsonl", "events.jsonl", "timeline.jsonl", "run.json", "config.yaml")
_ENDS = ("FINISHED", "STOPPED", "report.md", "plots", "hf")


def checkpoint_of(root: Path, step: int) -> Path:
    """The checkpoint of `step` in `root`, whole as far as sizes tell: before anything is moved for its sake.

    Raises:
        ConfigError: there is none, or a file of it is missing or cut off; names those that there are.
    """
    found = dict(folders.published(root))
    if step in found:
        if trouble := _not_whole(found[step]):
            others = ", ".join(str(other) for other in found if other != step) or "none"
            raise ConfigError(
                [
                    f"run.resume step {step}: the checkpoint {found[step]} cannot be used: {trouble}; nothing was "
                    f"moved. Other checkpoints are of steps {others}"
                ]
            )
        return found[step]
    steps = ", ".join(map(str, found)) or "none"
    raise ConfigError(
        [f"run.resume step {step}: {root} has no checkpoint of step {step}; there are those of steps {steps}"]
    )


def _not_whole(checkpoint: Path) -> str:
    """What is wrong with its files, without reading the large ones; "" where nothing is."""
    try:
        folders.read_state(checkpoint)
        for name, (size, _sha256) in sorted(folders.listed_files(checkpoint).items()):
            there = (checkpoint / name).stat().st_size
            if there != size:
                return f"{name} has {there:,} bytes, and {size:,} were written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except folders.CheckpointError as error:
        return str(error).partition(";")[0]
    return ""


def move_later_aside(folder: Path, root: Path, step: int) -> Path:
    """Move what is of steps after `step` to `folder`/moved_aside/after_step_N.K, and return that.

    Files with lines (metrics, events, timeline) are copied there whole: their later lines are cut off when they are
    opened again. Checkpoints outside `folder` go to a folder of the same name in `root`. It may be called again after
    an interruption: what was moved stays where it is.

    Raises:
        OSError: something cannot be moved.
    """
    number = 1
    while (aside := folder / ASIDE / f"after_step_{step}.{number}").exists():
        number += 1
    aside.mkdir(parents=True)
    for name in _LINES:
        if (folder / name).is_file():
            shutil.copy2(folder / name, aside / name)
    for path in _later(folder, step):
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    inside = Path(os.path.realpath(root)).is_relative_to(os.path.realpath(folder))
    kept = aside / "checkpoints" if inside else root / f"{aside.name}.aside"
    # The newest first, so that at any moment the newest that is left is one to go on from.
    for later, path in reversed(folders.published(root)):
        if later > step:
            kept.mkdir(parents=True, exist_ok=True)
            os.replace(path, _free(kept / path.name))
    _best_of_then(folder, root, step, aside)
    return aside


def _best_of_then(folder: Path, root: Path, step: int, aside: Path) -> None:
    """best.json, the link and hf_best are of the checkpoint of `step` again; those of a later best move to `aside`."""
    named = read_best(folder)
    if named is not None and named.step > step:
        for name in (HF_BEST, BEST):  # best.json last: with it this is begun again after an interruption
            if (folder / name).exists():
                os.replace(folder / name, aside / name)
        (root / LINK).unlink(missing_ok=True)
    settle_best(folder, root, folders.read_state(checkpoint_of(root, step)).get("run"), step)


def _later(folder: Path, step: int) -> Iterator[Path]:
    """What is of a later step in the run's folders, but for checkpoints, and what says how it ended."""
    for name in _ENDS:
        if (folder / name).exists():
            yield folder / name
    for inner in sorted(folder.iterdir()):
        if not inner.is_dir() or inner.is_symlink() or inner.name in (ASIDE, "checkpoints"):
            continue
        exported = _EXPORT.fullmatch(inner.name)
        if exported is not None:
            if int(exported[1]) > step:
                yield inner
            continue
        for path in sorted(inner.iterdir()):
            match = _STEP.search(path.name)
            if match is not None and int(match[1]) > step:
                yield path


def _free(target: Path) -> Path:
    place, number = target, 1
    while place.exists():
        place, number = target.with_name(f"{target.name}.{number}"), number + 1
    return place
