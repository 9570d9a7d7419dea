"""Reading a YAML file into plain data, with line numbers per key and duplicate keys found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_laser.errors import ConfigError

KeyPath = tuple[str, ...]


@dataclass
class YamlSource:
    """A parsed file: `data` as YAML gives it, `lines` from key path to line number (from 1), and problems
    that do not prevent reading on."""

    data: dict[Any, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_yaml(path: Path) -> YamlSource:
    """Reads `path` with the safe loader.

    Raises:
        ConfigError: no such file, not UTF-8, no valid YAML, or no mapping at the top.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(["no such file; expected a run configuration in YAML"], str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot be read: {error}"], str(path)) from error
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return YamlSource({})
        source = YamlSource({})
        if isinstance(node, yaml.MappingNode):
            _walk(node, (), source)
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError([_syntax(error)], str(path)) from error
    except RecursionError as error:
        raise ConfigError(["not valid YAML: nested too deeply"], str(path)) from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(
            [f"expected sections (model:, data:, run:, ...) at the top, got {type(data).__name__}"], str(path)
        )
    source.data = data
    return source


def _walk(node: yaml.MappingNode, prefix: KeyPath, source: YamlSource) -> None:
    """Notes each key's line and duplicates, down to the keys of a nested section, or of the tables in a list."""
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        path = (*prefix, str(key.value))
        line = key.start_mark.line + 1
        if path in source.lines:
            source.problems.append(
                f"line {line}: {'.'.join(path)}: given twice (first on line {source.lines[path]}); keep one"
            )
            continue
        source.lines[path] = line
        if isinstance(value, yaml.MappingNode) and len(prefix) < 2:
            _walk(value, path, source)
        elif isinstance(value, yaml.SequenceNode) and len(prefix) == 1:
            for index, item in enumerate(value.value):
                source.lines[*path, str(index)] = item.start_mark.line + 1
                if isinstance(item, yaml.MappingNode):
                    _walk(item, (*path, str(index)), source)


def syntax_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a text, in one line."""
    return " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())


def _syntax(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{where}not valid YAML: {syntax_problem(error)}"
