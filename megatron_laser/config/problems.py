"""What is wrong with a configuration's values, in words: where, what was expected, and the nearest right key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_laser.config.checks.sources import place_in_source, unknown_source_key
from megatron_laser.config.schema.readouts import ReadoutConfig
from megatron_laser.config.schema.root import key_paths, nested_sections
from megatron_laser.config.table_entries import TERMS_KEY
from megatron_laser.config.yaml_source import KeyPath

READOUTS_KEY = ("laser", "readouts")
_UNDERSCORES = re.compile(r"[-+]?[0-9][0-9_.]*_[0-9_.]*")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9]+(?::[0-5]?[0-9])+(?:\.[0-9]*)?")

_EXPECTED = {
    "float_type": "a number",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "string_type": "a string (quote it)",
    "bool_type": "true or false",
    "path_type": "a path",
    "tuple_type": "a list",
    "too_short": "at least one entry",
    "string_too_short": "a text that is not empty",
    "dict_type": "a table, {key: value}",
    "model_type": "a table, {key: value}",
    "is_instance_of": "a path",
    "finite_number": "a finite number",
}


def failed_keys(error: ValidationError) -> list[KeyPath]:
    """(section, key) of each setting at fault."""
    found = []
    for detail in error.errors(include_url=False):
        key = tuple(str(part) for part in detail["loc"][:3])
        found.append((key[0], ".".join(key[1:])) if key[:2] in nested_sections() else key[:2])
    return found


def describe(error: ValidationError, origin: Mapping[KeyPath, str]) -> list[str]:
    """One line for each key at fault, in pydantic's order."""
    lines: dict[tuple[int | str, ...], str] = {}
    for detail in error.errors(include_url=False):
        location = detail["loc"]
        key = tuple(str(part) for part in location[:2])
        if key in nested_sections() and len(location) > 2:
            key = (key[0], f"{key[1]}.{location[2]}")
            location = (*key, *location[3:])
        if (place := place_in_source(location)) is not None:
            path = (*key, *place)
            where = origin.get(path) or origin.get(path[:3]) or origin.get(key, "")
            name = f"{'.'.join(key)}[{place[0]}]" + "".join(f".{part}" for part in place[1:])
            unknown = detail["type"] == "extra_forbidden"
            reason = unknown_source_key(place[-1]) if unknown else _reason(key, detail)
            lines.setdefault(path, f"{where}{name}: {reason}")
            continue
        if detail["type"] == "extra_forbidden" and len(key) == 1 and isinstance(detail["input"], dict):
            # an unknown section: name each of its keys, since each may belong elsewhere
            paths: list[KeyPath] = [(key[0], str(name)) for name in detail["input"]] or [key]
        else:
            paths = [key]
        for path in paths:
            where = origin.get(path) or origin.get(path[:1], "")
            lines.setdefault(path, f"{where}{_name(path, location)}: {_reason(path, detail)}")
    return list(lines.values())


def _name(path: KeyPath, location: tuple[int | str, ...]) -> str:
    index = "".join(f"[{part}]" for part in location[2:] if isinstance(part, int))
    inner = f".{location[3]}" if path == READOUTS_KEY and len(location) > 3 else ""
    if path == TERMS_KEY:
        inner = "".join(f".{part}" for part in location[2:])
    return ".".join(path) + index + inner


def _reason(path: KeyPath, detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden" and path == READOUTS_KEY:
        return f"unknown key; the keys of a readout are {', '.join(ReadoutConfig.model_fields)}"
    if kind == "extra_forbidden":
        return f"unknown key; {suggest_key(path)}"
    if kind == "missing":
        return "required and not given"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {_written(value)}{_yaml_hint(kind, value)}"
    if kind == "literal_error":
        return f"expected {detail['ctx']['expected']}, got {_written(value)}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message if message.startswith("expected") else f"expected {message}"
    return f"{message}, got {_written(value)}"


def _written(value: Any) -> str:
    """A value for a message; nothing as YAML has it."""
    return "null" if value is None else repr(value)


def _yaml_hint(kind: str, value: Any) -> str:
    """What to write for a text that YAML 1.1 has as a number or a boolean."""
    if not isinstance(value, str):
        return ""
    if kind == "bool_type" and value.lower() in ("yes", "no", "on", "off", "y", "n"):
        return f" (text in YAML 1.2; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'})"
    if "type" in kind and _UNDERSCORES.fullmatch(value):
        return f" (text in YAML 1.2; write {value.replace('_', '')})"
    if _SEXAGESIMAL.fullmatch(value):
        return " (text in YAML 1.2; write one number)"
    return ""


_FORMER = {
    (
        "rollout",
        "max_concurrency",
    ): "it was over all servers; `rollout.max_concurrency_per_server` is for each of them"
}


def suggest_key(path: Sequence[str]) -> str:
    """A hint for the unknown key `path`, such as "did you mean `optimizer.lr`?".

    Looks for the same name in another section, then for a similar name in the same section, then for a
    similar name anywhere; lists the section's keys when nothing is near.
    """
    sections = key_paths()
    if path[0] not in sections:
        near = difflib.get_close_matches(path[0], sections, n=1, cutoff=0.6)
        if near and (len(path) == 1 or path[1] in sections[near[0]]):
            return _did_you_mean([".".join([near[0], *path[1:]])])
        return _elsewhere(path[-1]) or (
            _did_you_mean(near) if near else f"the sections are {', '.join(sections)}"
        )
    if len(path) == 1:
        return f"the keys of {path[0]} are {', '.join(sections[path[0]])}"
    section, key = path[0], path[1]
    if (former := _FORMER.get((section, key))) is not None:
        return former
    if len(path) > 2:
        if key in sections[section]:
            return f"{section}.{key} is a setting, not a section; did you mean `{section}.{key}`?"
        return f"keys have the form section.key; {suggest_key(path[:2])}"
    exact = [f"{other}.{key}" for other, keys in sections.items() if key in keys]
    if exact:
        return _did_you_mean(exact)
    near = difflib.get_close_matches(key, sections[section], n=1, cutoff=0.6)
    part = [name for name in sections[section] if len(key) >= 3 and (key in name or name in key)]
    begun = [name for name in part if name.startswith(key)]  # `samples` is the start of samples_per_prompt
    if begun or near or part:
        return _did_you_mean([f"{section}.{name}" for name in begun or near or part])
    return _elsewhere(key) or f"the keys of {section} are {', '.join(sections[section])}"


def _elsewhere(key: str) -> str:
    """A hint to the nearest key of any section, or "" when none is near."""
    owners: dict[str, list[str]] = {}
    for section, keys in key_paths().items():
        for name in keys:
            owners.setdefault(name, []).append(f"{section}.{name}")
    near = difflib.get_close_matches(key, owners, n=1, cutoff=0.7)
    return _did_you_mean(owners[near[0]]) if near else ""


def _did_you_mean(names: Sequence[str]) -> str:
    return "did you mean " + " or ".join(f"`{name}`" for name in names) + "?"
