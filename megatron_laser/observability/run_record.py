"""run.json of an output folder: which run it is, with which settings, and what was changed on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config.schema.fields import Kind

RUN = "run.json"


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


def read_run_record(folder: Path) -> dict[str, Any]:
    """Of the run in an output folder; {} where there is none, or none that can be read."""
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


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
