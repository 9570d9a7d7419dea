"""What the last start of a run has left in its folder: its settings, how it ended, and what was changed since.

Read before this start writes its own there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.config.yaml_source import read_yaml
from megatron_laser.files import last_lines
from megatron_laser.observability.events import FILE as EVENTS
from megatron_laser.observability.run_record import read_run_record
from megatron_laser.run.banner import Change, Earlier
from megatron_laser.run.status import STATUS, read_status

RUN = "run.json"  # `trainer.checkpoint.ownership.RUN`, which this start's settings are checked against
_TAIL = 1 << 20  # bytes of events.jsonl that hold how the last start ended
# A name and a place: another one is not another setting.
_NOT_TOLD = frozenset({"run.name", "run.output_dir", "run.resume"})


@dataclass(frozen=True)
class LastStart:
    """Of a folder in which a run has been started before.

    settings: of its config.yaml, {"section.key": value}. ended: how, in words. last_step: of metrics.jsonl.
    recorded: how many changes run.json had.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    earlier: Earlier = field(default_factory=Earlier)
    last_step: int = 0
    recorded: int = 0


def read_last_start(folder: Path) -> LastStart | None:
    """None where no run has been started in `folder`. What cannot be read is left out: it is there to be told."""
    if not (folder / RUN).is_file():
        return None
    settings: dict[str, Any] = {}
    with suppress(ConfigError, OSError):
        settings = flat(read_yaml(folder / "config.yaml").data)
    return LastStart(
        settings=settings,
        earlier=_how_it_ended(folder),
        last_step=_last_step(folder),
        recorded=len(read_run_record(folder).get("changes") or ()),
    )


def changes_since(last: LastStart | None, config: RunConfig, folder: Path) -> list[Change]:
    """The settings that are not what they were, in the order of the schema; with their kind where run.json has it.

    A setting that the last start did not know has not been changed.
    """
    last = last or LastStart()  # of a branch the changes against the run that it comes from are recorded
    found = {}
    for key, now in flat(config.model_dump(mode="json")).items():
        if key in last.settings and key not in _NOT_TOLD and not same(last.settings[key], now):
            found[key] = Change(key, last.settings[key], now)
    for one in (read_run_record(folder).get("changes") or ())[last.recorded :]:
        with suppress(KeyError, TypeError, ValueError):  # of a version that records them otherwise
            key = str(one["key"])
            found.pop(
                ".".join(key.split(".")[:2]), None
            )  # the same as a whole: `checkpoint.best` of its `metric`
            found[key] = Change(key, one["from"], one["to"], str(one["kind"]), int(one["step"]))
    return list(found.values())


def branch_of(folder: Path) -> str:
    """The run and the step that the one in `folder` was branched from, in words; "" for most."""
    branch = read_run_record(folder).get("branched_from")
    if not isinstance(branch, dict):
        return ""
    return f"step {branch.get('step')} of {branch.get('folder')}"


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.key": value}; what lies deeper stays as it is."""
    return {
        f"{section}.{key}": value
        for section, keys in settings.items()
        if isinstance(keys, Mapping)
        for key, value in keys.items()
    }


def same(one: Any, other: Any) -> bool:
    """Whether two values of a setting are equal; YAML has lists where the schema has tuples."""
    return bool(json.loads(json.dumps(one, default=str)) == json.loads(json.dumps(other, default=str)))


def _last_step(folder: Path) -> int:
    rows = last_lines(folder / "metrics.jsonl", most=1)
    step = rows[-1].get("step") if rows else None
    return step if isinstance(step, int) else 0


def _how_it_ended(folder: Path) -> Earlier:
    """As its last words have it: those of status.json, else those of the events."""
    events = [
        event
        for event in last_lines(folder / EVENTS, most=0, at_least=_TAIL)
        if event.get("kind") in ("start", "stop", "end")
    ]
    started = next((str(event.get("time", "")) for event in reversed(events) if event["kind"] == "start"), "")
    if (folder / "FINISHED").is_file():
        return Earlier(started, "finished")
    last = events[-1] if events else {}
    if last.get("kind") in ("stop", "end"):
        return Earlier(started, str(last.get("text", "")))
    status = read_status(folder)
    if status is not None and status.ended:
        reason = f": {status.reason}" if status.reason else ""
        return Earlier(status.started, f"{status.state} after step {status.step}{reason}")
    if started or (folder / STATUS).is_file():
        return Earlier(started, "ended without saying so: it was killed, or its machine went down")
    return Earlier()
