"""From YAML files and key=value overrides to a checked `RunConfig`, and back to YAML."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_laser.config.checks.settings import settings_problems
from megatron_laser.config.checks.sources import override_source, source_problems
from megatron_laser.config.layers import BASE, Layer, Origin, read_layers
from megatron_laser.config.modes import as_run
from megatron_laser.config.problems import READOUTS_KEY, describe, failed_keys, suggest_key
from megatron_laser.config.schema.root import RunConfig, key_paths, nested_sections
from megatron_laser.config.schema.sources import SOURCE_SETTINGS
from megatron_laser.config.schema.system import RESUME_STEP
from megatron_laser.config.table_entries import TABLE_KEYS, TERMS_KEY, with_entry
from megatron_laser.config.yaml_source import KeyPath
from megatron_laser.config.yaml_text import read_as_text_before, syntax_problem, yaml_text, yaml_value
from megatron_laser.errors import ConfigError
from megatron_laser.user_functions import split_system

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
PATH_KEY = ("data", "train")
FUNCTION_KEY = ("reward", "function")  # of a source
PROGRAM_KEY = ("rollout", "sglang.python")
MACHINE_KEY = ("logging", "machine")
RESUME_KEY = ("run", "resume")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where its settings were given, "section.key" -> "run.yaml:7" or "override". What is not
    among `places` has its default."""

    config: RunConfig
    places: dict[str, str]


def load_config(
    path: str | Path, overrides: Sequence[str] = (), set_files: Sequence[str | Path] = ()
) -> RunConfig:
    """Reads, merges, validates and checks a run configuration.

    Args:
        path: YAML file, perhaps with a `base`. Relative paths in a file start from its folder.
        overrides: "section.key=value" each, the value in YAML (lists, null, true). Relative paths in them
            start from the working directory. Of two for one key the last counts.
        set_files: YAML files of further settings, in sections or as `section.key: value`; they count more than
            `path` and less than overrides.

    Raises:
        ConfigError: with one line for each problem found.
    """
    return load_with_places(path, overrides, set_files).config


def load_with_places(
    path: str | Path, overrides: Sequence[str] = (), set_files: Sequence[str | Path] = ()
) -> Loaded:
    """`load_config`, and where each setting was given."""
    given = _Given()
    for layer in read_layers(Path(path)):
        given.add(layer)
    for file in set_files:
        for layer in read_layers(Path(file), main=False):
            given.add(layer, dotted=True)
    given.override(overrides)
    return Loaded(given.checked(str(path)), given.places())


def config_of(settings: dict[str, Any], overrides: Sequence[str] = (), source: str = "") -> RunConfig:
    """`load_config` of settings that stand in no file, {section: {key: value}}; `source` is what errors call them.

    Raises:
        ConfigError: with one line for each problem found.
    """
    given = _Given()
    given.problems += _flatten(settings, given.values, Path.cwd(), given.origin)
    given.override(overrides)
    return given.checked(source)


@dataclass
class _Given:
    """What files and overrides say so far.

    values: (section, key) -> value, paths made absolute. origin: key path -> where it was given. texts: (section, key)
    -> how a number was written that YAML 1.1 has as text.
    """

    values: dict[KeyPath, Any] = field(default_factory=dict)
    origin: dict[KeyPath, str] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, layer: Layer, *, dotted: bool = False) -> None:
        """A file's settings, in front of what there is.

        Args:
            dotted: whether `section.key: value` may stand at its top.
        """
        self.problems += layer.problems()
        origins: dict[KeyPath, str] = {**layer.origins()}
        for setting in [key for key in origins if len(key) == 2 and key not in nested_sections()]:
            for old in [
                old for old in self.origin if old[:2] == setting
            ]:  # what stood in a base counts no more
                del self.origin[old]
        values: dict[KeyPath, Any] = {}
        own = {key: value for key, value in layer.source.data.items() if not (dotted and "." in str(key))}
        self.problems += _flatten(own, values, layer.path.parent, origins)
        self.origin.update(origins)
        for path, value in values.items():
            self.values[path] = _merge(path, self.values.get(path), value)
            self.texts.pop(path, None)
        for key, text in layer.source.texts.items():
            self.texts[_leaf(key)] = text
        for key, value in layer.source.data.items():
            if key not in own:
                if (written := self.texts.pop((str(key),), None)) is not None:
                    self.texts[_leaf(tuple(str(key).split(".")))] = written
                where = layer.origin((str(key),)) or Origin(f"{layer.path}: ", str(layer.path))
                named: KeyPath = tuple(str(key).split("."))
                self.problems += _apply(named, value, where, layer.path.parent, self.values, self.origin)

    def override(self, overrides: Sequence[str]) -> None:
        """Settings of a command line."""
        for override in overrides:
            name, equals, text = override.partition("=")
            where = Origin(f"override {override!r}: ", "override")
            path = tuple(name.strip().split("."))
            if not equals or not all(path):
                self.problems.append(f"{where}expected section.key=value")
                continue
            try:
                value = yaml_value(text)
            except (yaml.YAMLError, RecursionError) as error:
                self.problems.append(
                    f"{where}the value is not valid YAML ({syntax_problem(error)}); quote it, for example "
                    f"'{name}=\"...\"'"
                )
                continue
            self.texts.pop(_leaf(path), None)
            if read_as_text_before(text):
                self.texts[_leaf(path)] = text
            self.problems += _apply(path, value, where, Path.cwd(), self.values, self.origin)

    def checked(self, source: str) -> RunConfig:
        """The configuration. Raises ConfigError."""
        problems, config = self.problems, None
        try:
            config = self._validated()
        except ValidationError as error:
            problems = problems + describe(error, self.origin)
        if config is not None:
            config = as_run(config)
            problems = problems + settings_problems(config) + source_problems(config.data, self.origin)
        if problems or config is None:
            raise ConfigError(problems, source)
        return config

    def _validated(self) -> RunConfig:
        try:
            return RunConfig.model_validate(_nest(self.values))
        except ValidationError as error:
            written = {key: self.texts[key] for key in failed_keys(error) if key in self.texts}
            if not written:
                raise
        # A run's name or a column that is written like a number of YAML 1.2 only, and has always been text.
        return RunConfig.model_validate(_nest({**self.values, **written}))

    def places(self) -> dict[str, str]:
        """ "section.key" -> where it was given, of all that were."""
        found = {}
        for path in self.values:
            where = next(
                (self.origin[path[:end]] for end in (2, 1) if path[:end] in self.origin), Origin("", "given")
            )
            found[".".join(path)] = getattr(where, "place", str(where))
        return found


def _leaf(path: KeyPath) -> KeyPath:
    """The (section, key) under which a key path's value is kept."""
    return (path[0], ".".join(path[1:3])) if path[:2] in nested_sections() else path[:2]


def _merge(path: KeyPath, old: Any, new: Any) -> Any:
    """A file's value over its base's: tables entry by entry, all else whole."""
    is_source = path[0] == "data" and path[-1] in SOURCE_SETTINGS
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) and not is_source else new


def resolved_yaml(config: RunConfig) -> str:
    """All settings, defaults and absolute paths included; `load_config` reads it back to an equal config."""
    return yaml_text(config.model_dump(mode="json"))


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
        elif content not in (None, {}):  # `laser:` with every key commented out is an empty section
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
                    origin[leaf] = where
                yield leaf, item
        elif path in nested_sections() and value is None:  # `sglang:` with every key commented out
            continue
        else:
            yield path, value


def _apply(
    path: KeyPath,
    value: Any,
    where: str,
    base: Path,
    values: dict[KeyPath, Any],
    origin: dict[KeyPath, str],
) -> list[str]:
    """Sets one dotted name; what is wrong with it."""
    if len(path) == 1 and isinstance(value, dict):
        content = {path[0]: value}
        for key in value:
            origin[(path[0], str(key))] = where
        return _flatten(content, values, base, origin)
    if path[:2] in nested_sections() and (len(path) > 2 or isinstance(value, dict)):
        return _apply_nested(path, value, where, base, values, origin)
    if path == (BASE,):
        return [f"{where}a base is named in a file; a further file of settings is `--set-file FILE`"]
    if len(path) == 1 and path[0] in key_paths():
        return [f"{where}{path[0]}: expected a section, {path[0]}={{key: value}}, or {path[0]}.key=value"]
    if len(path) > 2 and path[:2] in TABLE_KEYS:
        path, value = with_entry(path, value, values.get(path[:2]))
    if path[0] == "data" and path[1] in SOURCE_SETTINGS and len(path) > 3:
        value = source_paths({path[-1]: value}, base)[path[-1]]
        changed, problem = override_source(path, value, values.get(path[:2]), where, origin)
        values.update({} if problem else {path[:2]: changed})
        return [f"{where}{problem}"] if problem else []
    if len(path) != 2:
        return [f"{where}{'.'.join(path)}: unknown key; {suggest_key(path)}"]
    values[path] = absolute((path[0], path[1]), value, base)
    for inner in [key for key in origin if key[:2] == path]:  # what stood in the file counts no more
        del origin[inner]
    origin[path] = where
    return []


def _apply_nested(
    path: KeyPath,
    value: Any,
    where: str,
    base: Path,
    values: dict[KeyPath, Any],
    origin: dict[KeyPath, str],
) -> list[str]:
    """An override of a nested section's key, or of one entry of such a key that is a table."""
    if len(path) == 2:
        items = {(path[0], f"{path[1]}.{key}"): item for key, item in value.items()}
    else:
        leaf = (path[0], f"{path[1]}.{path[2]}")
        if len(path) == 4 and leaf == ("rollout", "sglang.options"):
            value = {**(values.get(leaf) or {}), path[3]: value}
        elif len(path) > 3:
            known = leaf[1] in key_paths()[path[0]]
            hint = f"{'.'.join(path[:3])} is a setting, not a section" if known else suggest_key(path)
            return [f"{where}{'.'.join(path)}: unknown key; {hint}"]
        items = {leaf: value}
    for leaf, item in items.items():
        values[leaf] = absolute(leaf, item, base)
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
    if key == RESUME_KEY:
        words = (
            not isinstance(value, str)
            or value.strip() in ("auto", "never")
            or RESUME_STEP.fullmatch(value.strip())
        )
        return value if words else _join(value, base)
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
    system, place = split_system(value) if isinstance(value, str) else ("", "")
    file, colon, function = place.rpartition(":")
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
    return os.path.normpath(base.absolute() / os.path.expanduser(value))  # ~nobody stays
