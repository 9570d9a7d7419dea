"""What was changed of a run since it began, as its run.json has it, and whether a start may change what is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from megatron_laser.observability.run_record import Change, changes_in, read_run_record

_allowed: ContextVar[bool] = ContextVar("a start may change what is learned", default=False)


def read_changes(folder: Path) -> list[Change]:
    """Of the run in an output folder, in the order of their steps; [] where there is no run or no such record."""
    return changes_in(read_run_record(folder))


def undone(settings: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """The settings with which `step` was trained, from the last ones.

    earlier: what run.json has as "undo": for the first step of each change the settings as they were before it.
    """
    found = dict(settings)
    for entry in sorted(earlier, key=lambda entry: int(entry["step"]), reverse=True):
        if int(entry["step"]) > step:
            found |= entry["settings"]
    return found


@contextmanager
def changes_allowed(allowed: bool) -> Iterator[None]:
    """Whether a run that starts inside may go on with other settings of what is learned (`train --change`)."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def may_change() -> bool:
    """What `changes_allowed` around this says."""
    return _allowed.get()
