"""What was changed of a run since it began, as its run.json has it, and whether a start may change what is learned."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config.schema.fields import Kind

RECORD = "run.json"
_allowed: ContextVar[bool] = ContextVar("a start may change what is learned", default=False)


@dataclass(frozen=True)
class Change:
    """A setting that has another value since `step`, the first step with it.

    key: `section.key`. before, after: as JSON. kind: `learning` or `running`, in a branch also `identity`. time: of the
    start that brought it, ISO 8601, UTC.
    """

    step: int
    key: str
    before: Any
    after: Any
    kind: Kind
    time: str

    def to_json(self) -> dict[str, Any]:
        """As run.json has it."""
        return {
            "step": self.step,
            "key": self.key,
            "from": self.before,
            "to": self.after,
            "kind": self.kind,
            "time": self.time,
        }

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.key} {self.before!r} -> {self.after!r} from step {self.step} on ({self.kind})"


def now() -> str:
    """ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_changes(folder: Path) -> list[Change]:
    """Of the run in an output folder, in the order of their steps; [] where there is no run or no such record."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return changes_in(record) if isinstance(record, dict) else []


def changes_in(record: Mapping[str, Any]) -> list[Change]:
    """Of run.json's content. What is no change is left out."""
    found = []
    for item in record.get("changes", ()):
        try:
            found.append(
                Change(
                    int(item["step"]),
                    str(item["key"]),
                    item["from"],
                    item["to"],
                    item["kind"],
                    str(item["time"]),
                )
            )
        except (KeyError, TypeError, ValueError):
            continue
    return sorted(found, key=lambda change: change.step)


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
