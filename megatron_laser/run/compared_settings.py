"""The settings of a run beside those that its record has: what differs, and what each difference would mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from megatron_laser.config import RunConfig
from megatron_laser.config.schema.fields import RUNNING, Changing, identity
from megatron_laser.config.schema.kinds import all_settings, changing
from megatron_laser.config.schema.root import nested_sections
from megatron_laser.run.moved_paths import same_elsewhere
from megatron_laser.run.readout_identity import comparable

Settings = dict[str, Any]
_PLACE = ("run.output_dir", "run.name", "run.resume")
"""Where it lies, what it is called after that, and how it is started: no change of the run."""
_GONE = identity("this version has no such setting")
_SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """A setting whose values differ, as JSON; None: it is not there."""

    key: str
    there: Any
    here: Any
    changing: Changing

    @property
    def text(self) -> str:
        """Both values."""
        return f"{self.key} {self.there!r} there and {self.here!r} here"


def settings_of(config: RunConfig) -> Settings:
    """All settings as {"section.key": JSON value}; keys of nested sections are `section.name.key`."""
    return dict(_flat(config.model_dump(mode="json")))


def recorded_settings(record: Mapping[str, Any]) -> Settings:
    """Those of run.json; an earlier version wrote nested sections as one value, and what identifies a run alone."""
    settings: Settings = {}
    for key, value in record["settings"].items():
        section, _, name = key.partition(".")
        if (section, name) in nested_sections() and isinstance(value, dict):
            settings |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            settings[key] = value
    return settings


def differences(theirs: Settings, config: RunConfig, contents: Mapping[str, str]) -> list[Difference]:
    """What `config` has otherwise than `theirs`, in the order of names.

    Readouts are compared by what they come to, and a setting that an earlier version did not have is as it is by
    default. Where LaSeR is off, now or then, its other settings have no effect and are not compared. Paths that lead to
    the same files elsewhere are differences that only say where things are.

    Args:
        contents: `moved_paths.contents` of the other run, as far as known.
    """
    ours = {key: value for key, value in settings_of(config).items() if key not in _PLACE}
    # Earlier versions did not write down what was free to change.
    unknown = {key for key in ours if key not in theirs and changing(key).kind == "running"}
    ours = {key: value for key, value in ours.items() if key not in unknown}
    theirs = {key: _default(key) for key in ours} | {
        key: value for key, value in theirs.items() if key not in _PLACE
    }
    if not (ours["laser.enabled"] and theirs["laser.enabled"]):
        ours, theirs = _without_laser(ours), _without_laser(theirs)
    theirs, ours = comparable(theirs, ours)
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        there, here = theirs.get(key), ours.get(key)
        if there == here:
            continue
        try:
            mark = changing(key)
        except KeyError:
            mark = _GONE
        if mark.kind != "running" and same_elsewhere(config, key, there, contents):
            mark = RUNNING
        found.append(Difference(key, there, here, mark))
    return found


def raw_differences(theirs: Settings, config: RunConfig) -> Settings:
    """What `theirs` has of the settings that differ, as they are written."""
    ours = settings_of(config)
    return {
        key: theirs[key] for key in theirs if key not in _PLACE and key in ours and theirs[key] != ours[key]
    }


def listed(found: Sequence[Difference]) -> str:
    """Both values of each, and where it is identity what would break."""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    text = ", ".join(difference.text for difference in found[:_SHOWN]) + more
    reasons: dict[str, list[str]] = {}
    for difference in found[:_SHOWN]:
        if difference.changing.reason:
            reasons.setdefault(difference.changing.reason, []).append(difference.key)
    if len(reasons) == 1:
        return f"{text}; {next(iter(reasons))}"
    return "; ".join([text, *(f"{', '.join(keys)}: {reason}" for reason, keys in reasons.items())])


def _flat(sections: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in all_settings():
        value: Any = sections
        for part in name.split("."):
            value = value[part]
        yield name, value


def _without_laser(settings: Settings) -> Settings:
    return {
        key: value
        for key, value in settings.items()
        if key == "laser.enabled" or not key.startswith("laser.")
    }


def _default(key: str) -> Any:
    """Of a setting, as JSON; None for one that has none."""
    section: Any = RunConfig
    *parents, name = key.split(".")
    for parent in parents:
        section = section.model_fields[parent].annotation
    value = section.model_fields[name].get_default(call_default_factory=True)
    return None if value is PydanticUndefined else to_jsonable_python(value)
