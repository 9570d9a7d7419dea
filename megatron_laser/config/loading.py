"""From a YAML file and key=value overrides to a checked `RunConfig`, and back to YAML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_laser.config.checks import structure_problems
from megatron_laser.config.errors import ConfigError
from megatron_laser.config.paths import absolute
from megatron_laser.config.schema import RunConfig, key_paths, nested_sections
from megatron_laser.config.suggestions import suggest_key
from megatron_laser.config.yaml_source import KeyPath, read_yaml, syntax_problem

_EXPECTED = {
    "float_type": "a number",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "string_type": "a string (quote it)",
    "bool_type": "true or false",
    "path_type": "a path",
    "tuple_type": "a list",
    "finite_number": "a finite number",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads, merges, validates and checks a run configuration.

    Args:
        path: YAML file. Relative paths in it start from its folder.
        overrides: "section.key=value" each, the value in YAML (lists, null, true). Relative paths in them
            start from the working directory. Of two for one key the last counts.

    Raises:
        ConfigError: with one line for each problem found.
    """
    path = Path(path)
    source = read_yaml(path)
    problems = list(source.problems)
    values: dict[KeyPath, Any] = {}
    origin: dict[KeyPath, str] = {key: f"line {line}: " for key, line in source.lines.items()}
    problems += _flatten(source.data, values, path.parent, origin)
    for override in overrides:
        problems += _apply_override(override, values, origin)
    config = None
    try:
        config = RunConfig.model_validate(_nest(values))
    except ValidationError as error:
        problems += _describe(error, origin)
    if config is not None:
        problems += structure_problems(config)
    if problems or config is None:
        raise ConfigError(problems, str(path))
    return config


def resolved_yaml(config: RunConfig) -> str:
    """All settings, defaults and absolute paths included; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _flatten(
    data: dict[Any, Any], values: dict[KeyPath, Any], base: Path, origin: dict[KeyPath, str]
) -> list[str]:
    """Puts section.key -> value into `values`, paths made absolute. Unknown keys go in too: the schema
    refuses them."""
    problems = []
    for section, content in data.items():
        section = str(section)
        if isinstance(content, dict) and content:
            for path, value in _leaves(section, content, origin):
                values[path] = absolute(path, value, base)
        elif section not in key_paths():
            values[(section,)] = content
        elif content:  # `laser:` with every key commented out is an empty section
            where = origin.get((section,), "")
            problems.append(
                f"{where}{section}: expected a section, {section}: {{key: value}}, got {content!r}"
            )
    return problems


def _leaves(
    section: str, content: dict[Any, Any], origin: dict[KeyPath, str]
) -> Iterator[tuple[tuple[str, str], Any]]:
    """(section, key) -> value; the keys of a nested section as `name.key`."""
    for key, value in content.items():
        path = (section, str(key))
        if path in nested_sections() and isinstance(value, dict):
            for inner, item in value.items():
                leaf = (section, f"{key}.{inner}")
                where = origin.get((*path, str(inner)), origin.get(path))
                if where is not None:
                    origin.setdefault(leaf, where)
                yield leaf, item
        elif path in nested_sections() and value is None:  # `sglang:` with every key commented out
            continue
        else:
            yield path, value


def _apply_override(override: str, values: dict[KeyPath, Any], origin: dict[KeyPath, str]) -> list[str]:
    name, equals, text = override.partition("=")
    where = f"override {override!r}: "
    path = tuple(name.strip().split("."))
    if not equals or not all(path):
        return [f"{where}expected section.key=value"]
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        problem = syntax_problem(error) if isinstance(error, yaml.YAMLError) else "nested too deeply"
        return [f"{where}the value is not valid YAML ({problem}); quote it, for example '{name}=\"...\"'"]
    if len(path) == 1 and isinstance(value, dict):
        content = {path[0]: value}
        for key in value:
            origin[(path[0], str(key))] = where
        return _flatten(content, values, Path.cwd(), origin)
    if path[:2] in nested_sections() and (len(path) > 2 or isinstance(value, dict)):
        return _apply_nested(path, value, where, values, origin)
    if len(path) != 2:
        return [f"{where}{'.'.join(path)}: unknown key; {suggest_key(path)}"]
    values[path] = absolute((path[0], path[1]), value, Path.cwd())
    origin[path] = where
    return []


def _apply_nested(
    path: KeyPath, value: Any, where: str, values: dict[KeyPath, Any], origin: dict[KeyPath, str]
) -> list[str]:
    """An override of a nested section's key, or of one entry of such a key that is a table."""
    if len(path) == 2:
        items = {(path[0], f"{path[1]}.{key}"): item for key, item in value.items()}
    else:
        leaf = (path[0], f"{path[1]}.{path[2]}")
        if len(path) == 4 and leaf == ("rollout", "sglang.options"):
            value = {**(values.get(leaf) or {}), path[3]: value}
        elif len(path) > 3:
            return [f"{where}{'.'.join(path)}: unknown key; {suggest_key(path)}"]
        items = {leaf: value}
    for leaf, item in items.items():
        values[leaf] = absolute(leaf, item, Path.cwd())
        origin[leaf] = where
    return []


def _nest(values: dict[KeyPath, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {"model": {}, "data": {}, "run": {}}  # so that their missing keys are named
    for path, value in values.items():
        if len(path) == 1:
            nested[path[0]] = value
        else:
            section = nested.setdefault(path[0], {})
            outer, _, inner = path[1].partition(".")
            if isinstance(section, dict) and inner and (path[0], outer) in nested_sections():
                section.setdefault(outer, {})[inner] = value
            elif isinstance(section, dict):
                section[path[1]] = value
    return nested


def _describe(error: ValidationError, origin: dict[KeyPath, str]) -> list[str]:
    """One line for each key at fault, in pydantic's order."""
    lines: dict[tuple[int | str, ...], str] = {}
    for detail in error.errors(include_url=False):
        location = detail["loc"]
        key = tuple(str(part) for part in location[:2])
        if key in nested_sections() and len(location) > 2:
            key = (key[0], f"{key[1]}.{location[2]}")
            location = (*key, *location[3:])
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
    return ".".join(path) + index


def _reason(path: KeyPath, detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key; {suggest_key(path)}"
    if kind == "missing":
        return "required and not given"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {value!r}"
    if kind == "literal_error":
        return f"expected {detail['ctx']['expected']}, got {value!r}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message if message.startswith("expected") else f"expected {message}"
    return f"{message}, got {value!r}"
