"""Which checkpoint is the best: RUN/best.json says it, and the link `best` beside the checkpoints leads to it.

Files only, no torch. What the best evaluation is stands in the state of every checkpoint, so that a run that goes on
from an older one has the best of then; best.json is written after it.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_laser.files import remove, write_atomically
from megatron_laser.trainer.checkpoint import folder as folders

logger = logging.getLogger(__name__)

BEST = "best.json"
LINK = "best"
HF_BEST = "hf_best"
STATE = "best"
"""Key of rank 0's part of a checkpoint's state."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation: after which step, by which metric, and its value."""

    step: int
    metric: str
    mode: str
    value: float

    @staticmethod
    def of(values: Any) -> Best | None:
        """What `state` or best.json holds; None where it is none."""
        try:
            return Best(
                int(values["step"]), str(values["metric"]), str(values["mode"]), float(values["value"])
            )
        except (TypeError, KeyError, ValueError):
            return None


def read_best(output_dir: Path) -> Best | None:
    """What RUN/best.json says; None without one that can be read."""
    try:
        return Best.of(json.loads((output_dir / BEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def best_folder(root: Path, best: Best) -> Path:
    """The folder of its checkpoint."""
    return folders.partial_folder(root, best.step).with_suffix("")


def settle_best(output_dir: Path, root: Path, run_state: dict[str, Any] | None, step: int) -> int | None:
    """Have best.json and the link say what `run_state`, of the checkpoint of `step`, says; the step of the best.

    Where that one has not been saved the one before stays the best, unless it is of a later step than `step`, whose
    weights the run has left behind; then there is none. RUN/hf_best goes with the one that it was made of.

    Raises:
        OSError: best.json cannot be written, or something of the one before not be deleted.
    """
    there = {number for number, _ in folders.published(root)}
    named = read_best(output_dir)
    best = Best.of((run_state or {}).get(STATE))
    if best is None or best.step not in there:
        best = named
    if best is None:
        return None
    if best.step > step or best.step not in there:
        remove(output_dir / HF_BEST)
        (output_dir / BEST).unlink(missing_ok=True)
        (root / LINK).unlink(missing_ok=True)
        return None
    if best != named:
        remove(output_dir / HF_BEST)  # of the one before
        _write(output_dir, root, best)
    _link(root, best)
    return best.step


def _write(output_dir: Path, root: Path, best: Best) -> None:
    values = {**asdict(best), "checkpoint": str(best_folder(root, best))}
    write_atomically(output_dir / BEST, json.dumps(values, indent=1) + "\n")


def _link(root: Path, best: Best) -> None:
    link, target = root / LINK, best_folder(root, best).name
    try:
        if not link.is_symlink() or os.readlink(link) != target:
            new = root / f".{LINK}.{os.getpid()}"
            new.unlink(missing_ok=True)
            new.symlink_to(target)
            os.replace(new, link)
    except OSError as error:  # best.json names it all the same
        logger.warning("%s cannot be made a link to %s: %s", link, target, error)
