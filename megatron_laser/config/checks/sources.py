"""Sources of problems: what a list of them must not hold, where that stands, and overrides of one of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from megatron_laser.config.schema.inputs import DataConfig
from megatron_laser.config.schema.sources import (
    EVALUATION_KEYS,
    SOURCE_SETTINGS,
    TAGS,
    DataSource,
    listed_sources,
)
from megatron_laser.config.yaml_source import KeyPath

_KEYS = tuple(DataSource.model_fields)


def source_problems(data: DataConfig, origin: Mapping[KeyPath, str]) -> list[str]:
    """Names that two sources have, and weights where nothing is weighed.

    Args:
        origin: key path -> where it was given, for example "line 7: ".
    """
    problems = []
    for setting in SOURCE_SETTINGS:
        sources = listed_sources(getattr(data, setting))
        first: dict[str, int] = {}
        for index, source in enumerate(sources):
            earlier = first.setdefault(source.label, index)
            if earlier != index:
                where = _where(origin, ("data", setting, str(index), "name"))
                problems.append(
                    f"{where}data.{setting}[{index}].name: {source.label!r} is the name of data.{setting}[{earlier}], "
                    "too; give one of them another name"
                )
            problems += _evaluation_only(setting, index, source, origin)
            if setting != "train" and source.weight is not None:
                where = _where(origin, ("data", setting, str(index), "weight"))
                problems.append(
                    f"{where}data.{setting}[{index}].weight: {source.weight:g}, but an evaluation takes every problem "
                    "of each source once; leave it out"
                )
    return problems


def _evaluation_only(
    setting: str, index: int, source: DataSource, origin: Mapping[KeyPath, str]
) -> list[str]:
    if setting != "train":
        return []
    return [
        f"{_where(origin, ('data', setting, str(index), key))}data.{setting}[{index}].{key}: {value:g} is for "
        "sources of data.validation and data.test; leave it out"
        for key in EVALUATION_KEYS
        if (value := getattr(source, key)) is not None
    ]


def place_in_source(location: tuple[int | str, ...]) -> tuple[str, ...] | None:
    """(index, key) of an error inside a list of sources, (index,) of one about a whole source; None elsewhere."""
    if location[0] != "data" or len(location) < 4 or location[1] not in SOURCE_SETTINGS:
        return None
    rest = [part for part in location[2:] if part not in TAGS]
    return tuple(map(str, rest[:2])) if location[2] == "sources" and rest else None


def unknown_source_key(key: str) -> str:
    """What to do about a key that no source has."""
    near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.6)
    hint = f"did you mean `{near[0]}`?" if near else f"the keys of a source are {', '.join(_KEYS)}"
    return f"unknown key; {hint}"


def override_source(
    path: KeyPath, value: Any, current: Any, where: str, origin: dict[KeyPath, str]
) -> tuple[list[Any] | None, str]:
    """`data.train.NAME.key=value`: (the list with that change, "") or (None, what is wrong).

    Args:
        path: ("data", setting, name, key). value: absolute already where it is a path.
        current: the setting's value, as YAML gives it.
    """
    setting, name, key = f"data.{path[1]}", ".".join(path[2:-1]), path[-1]
    items = [current] if isinstance(current, dict) else current
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return None, f"{setting} is no list of sources, of which one has the name {name!r}"
    names = [_label(item) for item in items]
    if name not in names:
        return None, f"{setting} has no source {name!r}; its sources are {', '.join(map(str, names))}"
    place = names.index(name)
    origin[*path[:2], str(place), key] = where
    return [{**item, key: value} if index == place else item for index, item in enumerate(items)], ""


def _label(item: dict[str, Any]) -> str | None:
    try:
        return DataSource.model_validate({"path": item.get("path"), "name": item.get("name")}).label
    except ValueError:
        return None


def _where(origin: Mapping[KeyPath, str], path: KeyPath) -> str:
    """Of the longest part of `path` whose place is known."""
    return next((origin[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origin), "")
