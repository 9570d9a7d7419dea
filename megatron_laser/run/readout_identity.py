"""Readouts of a run and of the one in its folder, compared by what they come to, however they are written."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from megatron_laser.config import RunConfig
from megatron_laser.config.readouts import readout_setting, readouts
from megatron_laser.config.schema.readouts import ReadoutConfig
from megatron_laser.config.schema.training import LaserConfig

_LIST = "laser.readouts"
Settings = dict[str, Any]


def comparable(theirs: Settings, ours: Settings) -> tuple[Settings, Settings]:
    """{"section.key": JSON value} of two runs, in which what makes up readouts is as it takes effect.

    Where one of them has a list of readouts, both have one line for each key of each entry, with what the entry leaves
    out filled in, in place of the settings of `laser` that it comes from; a readout that one of them lacks is one line.
    So `readouts: [{}]` is what no list is. Without a list, without LaSeR, or with values that this version does not
    know, settings are as they are.
    """
    if theirs.get(_LIST) is None and ours.get(_LIST) is None:
        return theirs, ours
    try:
        there, here = _config(theirs), _config(ours)
    except ValidationError:  # of another version
        return theirs, ours
    if not (there.laser.enabled and here.laser.enabled):
        return theirs, ours
    sources = {_LIST, *(readout_setting(_config({}), 0, key) for key in ReadoutConfig.model_fields)}
    pair = [{key: value for key, value in side.items() if key not in sources} for side in (theirs, ours)]
    counts = len(readouts(there)), len(readouts(here))
    for index in range(max(counts)):
        if index >= min(counts):
            for side, config, count in zip(pair, (there, here), counts, strict=True):
                side[f"{_LIST}[{index}]"] = _written(config, index) if index < count else None
            continue
        left, right = _effective(there, index), _effective(here, index)
        for key in ReadoutConfig.model_fields:
            name = readout_setting(here, index, key)
            values = left[key], right[key]
            # Several entries may take it from one setting of `laser`, which is said once, and else by the entry's name.
            if values[0] == values[1] or (pair[0].get(name), pair[1].get(name)) not in ((None, None), values):
                name = f"{_LIST}[{index}].{key}"
            pair[0][name], pair[1][name] = values
    return pair[0], pair[1]


def _config(settings: Settings) -> RunConfig:
    """Of which only `laser` is there."""
    values = {
        key.removeprefix("laser."): value for key, value in settings.items() if key.startswith("laser.")
    }
    return RunConfig.model_construct(laser=LaserConfig.model_validate(values))


def _effective(config: RunConfig, index: int) -> Settings:
    """An entry with everything filled in, by the keys of `ReadoutConfig`."""
    entries = config.laser.readouts or (ReadoutConfig(),)
    whole = readouts(config)[index]
    found = {}
    for key in ReadoutConfig.model_fields:
        value = getattr(entries[index], key)
        if value is None:
            place = readout_setting(config, index, key).removeprefix("laser.")
            value = getattr(whole, key) if hasattr(whole, key) else getattr(config.laser, place)
        found[key] = to_jsonable_python(value)
    return found


def _written(config: RunConfig, index: int) -> Settings:
    """What the user wrote of an entry, or something that reads like it."""
    entries = config.laser.readouts or (ReadoutConfig(),)
    found: Settings = entries[index].model_dump(mode="json", exclude_defaults=True)
    return found
