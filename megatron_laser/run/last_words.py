"""The last lines of a run: how it ended, what went wrong, what is saved and what was written where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_laser.observability.quantities import format_duration
from megatron_laser.report.what_happened import NOTHING, Happened
from megatron_laser.run.settings_words import labelled

_FILES: Mapping[str, str] = {
    "metrics.jsonl": "",
    "events.jsonl": "",
    "report.md": "",
    "plots": "/",
    "evaluation": "/",
    "rollouts": "/",
    "batches": "/",
    "bad_steps": "/",
    "tensorboard": "/",
    "profile": "/",
    "stacks": "/",
    "servers": "/",
    "hf": "/",
    "best.json": "",
    "hf_best": "/",
}


def last_words(
    how: str,
    happened: Happened,
    folder: Path,
    *,
    seconds: float,
    first_step: int,
    steps: int,
    checkpoints: Path,
    newest: int | None,
    width: int | None = None,
) -> list[str]:
    """The lines.

    Args:
        how: "finished", or how else it ended.
        seconds: of this start. first_step: its first one. steps: `run.steps`.
        checkpoints: their folder. newest: the step of the newest published one.
        width: columns at which lines are broken; None: never.
    """
    own = max(0, happened.steps - first_step + 1)
    since = f", {own} of them by this start" if first_step > 1 else ""
    told = [
        (
            "ended",
            f"{how}: {happened.steps} of {steps} steps{since}; {format_duration(seconds)} since this start",
        )
    ]
    wrong = happened.wrong
    told += [("wrong" if place == 0 else "", text) for place, text in enumerate(wrong)]
    if not wrong:
        told.append(("wrong", f"nothing: {NOTHING}"))
    if newest is None:
        told.append(("saved", "no checkpoint"))
    else:
        count = len(happened.saves)
        saves = f"{count} save{'' if count == 1 else 's'}, " if count else ""
        told.append(("saved", f"{saves}the newest checkpoint is of step {newest}, in {checkpoints}"))
    there = [name + end for name, end in _FILES.items() if (folder / name).exists()]
    told.append(("written", f"{folder}: {', '.join(there)}" if there else f"nothing in {folder}"))
    return labelled(told, width)
