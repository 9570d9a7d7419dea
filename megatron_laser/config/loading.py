"""From a YAML file and key=value overrides to a checked `RunConfig`, and back to YAML."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_laser.config.checks.settings import settings_problems
from megatron_laser.config.checks.sources import (
    override_source,
    place_in_source,
    source_problems,
    unknown_source_key,
)
from megatron_laser.config.modes import as_run
from megatron_laser.config.schema.readouts import ReadoutConfig
from megatron_laser.config.schema.root import RunConfig, key_paths, nested_sections
from megatron_laser.config.schema.sources import SOURCE_SETTINGS
from megatron_laser.config.yaml_source import KeyPath, read_yaml, syntax_problem
from megatron_laser.errors import ConfigError

PATH_KEYS = frozenset(
    {
        ("model", "path"),
        ("data", "train"),
        ("data", "validation"),
        ("data", "test"),
        ("run", "output_dir"),
        ("run", "batches"),
        ("checkpoint", "folder"),
        ("rollout", "sync_folder"),
        ("rollout", "sglang.endpoints"),
    }
)
FUNCTION_KEYS = frozenset(
    {("reward", "function"), ("rollout", "function"), ("policy", "loss"), ("policy", "advantage")}
)
READOUTS_KEY = ("laser", "readouts")
TERMS_KEY = ("reward", "terms")
OPTION_KEY = ("rollout", "function_options")
PATH_KEY = ("data", "train")
FUNCTION_KEY = ("reward", "function")  # of a source
TEMPLATE_KEY = ("data", "chat_template_arguments")
PROGRAM_KEY = ("rollout", "sglang.python")
MACHINE_KEY = ("logging", "machine")

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
    origin: dict[KeyPath, str] = {key: f"line {line}: " for key, line in source.lines.items()}
    return _checked(source.data, path.parent, overrides, list(source.problems), origin, str(path))


def config_of(settings: dict[str, Any], overrides: Sequence[str] = (), source: str = "") -> RunConfig:
    """`load_config` of settings that stand in no file, {section: {key: value}}; `source` is what errors call them.

    Raises:
        ConfigError: with one line for each problem found.
    """
    return _checked(settings, Path.cwd(), overrides, [], {}, source)


def _checked(
    data: dict[Any, Any],
    base: Path,
    overrides: Sequence[str],
    problems: list[str],
    origin: dict[KeyPath, str],
    source: str,
) -> RunConfig:
    values: dict[KeyPath, Any] = {}
    problems += _flatten(data, values, base, origin)
    for override in overrides:
        problems += _apply_override(override, values, origin)
    config = None
    try:
        config = RunConfig.model_validate(_nest(values))
    except ValidationError as error:
        problems += _describe(error, origin)
    if config is not None:
        config = as_run(config)
        problems += settings_problems(config) + source_problems(config.data, origin)
    if problems or config is None:
        raise ConfigError(problems, source)
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
    if len(path) == 3 and path[:2] == OPTION_KEY and isinstance(given := values.get(OPTION_KEY) or {}, dict):
        path, value = OPTION_KEY, {**given, path[-1]: value}
    if path[:2] == TEMPLATE_KEY and len(path) == 3:
        given = values.get(TEMPLATE_KEY)
        values[TEMPLATE_KEY] = {**(given if isinstance(given, dict) else {}), path[2]: value}
        origin[TEMPLATE_KEY] = where
        return []
    if path[0] == "data" and path[1] in SOURCE_SETTINGS and len(path) > 3:
        value = source_paths({path[-1]: value}, Path.cwd())[path[-1]]
        changed, problem = override_source(path, value, values.get(path[:2]), where, origin)
        values.update({} if problem else {path[:2]: changed})
        return [f"{where}{problem}"] if problem else []
    if len(path) != 2:
        return [f"{where}{'.'.join(path)}: unknown key; {suggest_key(path)}"]
    values[path] = absolute((path[0], path[1]), value, Path.cwd())
    for inner in [key for key in origin if key[:2] == path]:  # what stood in the file counts no more
        del origin[inner]
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
        return f"expected {_EXPECTED[kind]}, got {value!r}"
    if kind == "literal_error":
        return f"expected {detail['ctx']['expected']}, got {value!r}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message if message.startswith("expected") else f"expected {message}"
    return f"{message}, got {value!r}"


def absolute(key: tuple[str, str], value: Any, base: Path) -> Any:
    """`value` with its relative paths made absolute against `base`.

    Only the settings that hold paths are touched, and only strings in them: whatever else is wrong with the
    value is the schema's to say.
    """
    if key in PATH_KEYS:
        if isinstance(value, list):
            return [
                source_paths(item, base) if isinstance(item, dict) else _join(item, base) for item in value
            ]
        return source_paths(value, base) if isinstance(value, dict) else _join(value, base)
    if key == PROGRAM_KEY and isinstance(value, str) and "/" in value:  # a bare name is looked up on PATH
        return _join(value, base)
    if key == MACHINE_KEY and isinstance(value, str) and ("/" in value or value.endswith((".yaml", ".yml"))):
        return _join(value, base)  # a bare name is one that the planner knows
    if key in FUNCTION_KEYS:
        return _absolute_function(value, base)
    if key == TERMS_KEY and isinstance(value, dict):
        return {
            name: source_paths(term, base) if isinstance(term, dict) else term for name, term in value.items()
        }
    if key == READOUTS_KEY and isinstance(value, list):
        return [
            {
                name: _absolute_function(item, base) if name == "advantages" else item
                for name, item in entry.items()
            }
            if isinstance(entry, dict)
            else entry
            for entry in value
        ]
    return value


def _absolute_function(value: Any, base: Path) -> Any:
    file, colon, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    system = next((prefix for prefix in ("verl:", "trl:") if file.startswith(prefix)), "")
    file = file.removeprefix(system)
    return f"{system}{_join(file, base)}:{function}" if colon and file.endswith(".py") else value


def source_paths(source: dict[Any, Any], base: Path) -> dict[Any, Any]:
    """A source of problems with its files and its verifier, or a term of the reward, made absolute."""
    settings = {"path": PATH_KEY, "reward": FUNCTION_KEY, "function": FUNCTION_KEY}
    return {
        key: absolute(settings[key], value, base) if key in settings else value
        for key, value in source.items()
    }


def _join(value: Any, base: Path) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    return os.path.normpath(base.absolute() / Path(value).expanduser())


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
