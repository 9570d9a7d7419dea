"""A configuration as YAML that says where each value comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_laser.config.loading import Loaded, config_of
from megatron_laser.config.schema.root import RunConfig, key_paths
from megatron_laser.config.yaml_text import yaml_text

DEFAULT = "default"
FOLLOWS = "follows from other settings"
_INDENT = "  "
_COMMENT_COLUMN = 44
_ANY_WIDTH = 10**6  # nothing is folded: a comment stands behind the whole value


def settings(config: RunConfig) -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of every setting in the schema's order; a nested section's keys are `name.key`."""
    dumped = config.model_dump(mode="json")
    for section, keys in key_paths().items():
        for key in keys:
            outer, _, inner = key.partition(".")
            value = dumped[section][outer]
            yield section, key, value[inner] if inner else value


def shown(loaded: Loaded, *, every: bool = False, origins: bool = False) -> str:
    """The settings as YAML, which `load_config` reads back to an equal configuration.

    Args:
        every: defaults too; otherwise what a file, an override or a variable gave.
        origins: a comment behind each value: the file and line, "override" or "default".
    """
    places = {
        f"{section}.{key}": _place(loaded.places, f"{section}.{key}")
        for section, key, _ in settings(loaded.config)
    }
    if not every:
        again = _read_back(loaded.config, places)  # a smoke run is named by the folder of the run itself
        for (section, key, value), (_, _, now) in zip(settings(loaded.config), settings(again), strict=True):
            if value != now:
                places[f"{section}.{key}"] = places[f"{section}.{key}"] or FOLLOWS
    lines: list[str] = []
    above: tuple[str, ...] = ()
    for section, key, value in settings(loaded.config):
        place = places[f"{section}.{key}"]
        if place is None and not every:
            continue
        parents = (section, *key.split(".")[:-1])
        for depth, name in enumerate(parents):
            if parents[: depth + 1] != above[: depth + 1]:
                lines.append(f"{_INDENT * depth}{name}:")
        above = parents
        lines += _entry(key.split(".")[-1], value, len(parents), (place or DEFAULT) if origins else "")
    return "\n".join(lines) + "\n"


def _read_back(config: RunConfig, places: Mapping[str, str | None]) -> RunConfig:
    """What is made of the settings that have a place."""
    given: dict[str, dict[str, Any]] = {}
    for section, key, value in settings(config):
        if places[f"{section}.{key}"] is not None:
            outer, _, inner = key.partition(".")
            content = given.setdefault(section, {})
            if inner:
                content = content.setdefault(outer, {})
            content[inner or outer] = value
    return config_of(given)


def _place(places: Mapping[str, str], name: str) -> str | None:
    """Where a setting was given; a nested section that a file gave as a whole counts for its keys."""
    while name.count(".") >= 1:
        if name in places:
            return places[name]
        name = name.rpartition(".")[0]
    return None


def _entry(key: str, value: Any, depth: int, comment: str) -> list[str]:
    text = yaml_text({key: value}, width=_ANY_WIDTH)
    lines = textwrap.indent(text.rstrip("\n"), _INDENT * depth).split("\n")
    if not comment:
        return lines
    comment = " ".join(comment.split())  # a file's name may hold anything
    if len(lines) > 1 and isinstance(value, str):  # a text of several lines: a comment in it would be text
        return [f"{_INDENT * depth}# {comment}", *lines]
    return [f"{lines[0]:<{_COMMENT_COLUMN}}  # {comment}", *lines[1:]]
