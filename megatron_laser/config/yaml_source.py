"""Reading a YAML file into plain data: line numbers per key, duplicate keys found, variables replaced.

Keys at the top that begin with `x-` hold anchors and nothing else; they are left out of the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_laser.config.variables import LITERAL_KEYS, expand, nested_problem, unset_problem
from megatron_laser.config.yaml_text import Loader, read_as_text_before, syntax_problem
from megatron_laser.errors import ConfigError

KeyPath = tuple[str, ...]
_MERGE = "tag:yaml.org,2002:merge"
_IGNORED = "x-"
_DEPTH = 4


@dataclass
class YamlSource:
    """A parsed file: `data` as YAML gives it, `lines` from key path to line number (from 1), and problems
    that do not prevent reading on.

    variables: key path -> names of the environment variables that its value was made of.
    texts: key path -> the plain text of a number that YAML 1.1 has as text, such as 1e5 for a run's name.
    twice: (line, key) of the keys that `problems` names by their path.
    """

    data: dict[Any, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    variables: dict[KeyPath, tuple[str, ...]] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    twice: set[tuple[int, str]] = field(default_factory=set)


def read_yaml(path: Path) -> YamlSource:
    """Reads `path` with the safe loader of YAML 1.2.

    Raises:
        ConfigError: no such file, not UTF-8, no valid YAML, no mapping at the top, or a variable that is not set.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(["no such file; expected a run configuration in YAML"], str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot be read: {error}"], str(path)) from error
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return YamlSource({})
        source = YamlSource({})
        if isinstance(node, yaml.MappingNode):
            _walk(node, (), source)
            source.problems += [
                f"line {line}: {key}: given twice (first on line {first}); keep one"
                for key, line, first in loader.twice
                if (line, key) not in source.twice
            ]
            variables = _Variables(loader, source)
            variables.replace(node)
            if variables.problems:
                raise ConfigError(variables.problems, str(path))
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError([_syntax(error, text)], str(path)) from error
    except RecursionError as error:
        raise ConfigError(["not valid YAML: nested too deeply"], str(path)) from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(
            [f"expected sections (model:, data:, run:, ...) at the top, got {type(data).__name__}"], str(path)
        )
    source.data = {key: value for key, value in data.items() if not str(key).startswith(_IGNORED)}
    return source


def _walk(node: yaml.MappingNode, prefix: KeyPath, source: YamlSource) -> None:
    """Notes each key's line and duplicates, down to the keys of a nested section, or of the tables in a list."""
    own: dict[str, int] = {}
    for key, value in node.value:
        if key.tag == _MERGE:
            continue
        path = (*prefix, str(key.value))
        line = key.start_mark.line + 1
        if path[-1] in own:
            source.problems.append(
                f"line {line}: {'.'.join(path)}: given twice (first on line {own[path[-1]]}); keep one"
            )
            source.twice.add((line, path[-1]))
            continue
        own[path[-1]] = line
        _note(path, line, value, source)
    for merged in _merged(node):
        for key, value in merged.value:  # where it stands, under the anchor
            if key.tag != _MERGE and (*prefix, str(key.value)) not in source.lines:
                _note((*prefix, str(key.value)), key.start_mark.line + 1, value, source)


def _note(path: KeyPath, line: int, value: yaml.Node, source: YamlSource) -> None:
    source.lines[path] = line
    if isinstance(value, yaml.MappingNode) and len(path) <= 2:
        _walk(value, path, source)
    elif isinstance(value, yaml.SequenceNode) and len(path) == 2:
        for index, item in enumerate(value.value):
            source.lines[*path, str(index)] = item.start_mark.line + 1
            if isinstance(item, yaml.MappingNode):
                _walk(item, (*path, str(index)), source)


def _merged(node: yaml.MappingNode) -> Iterator[yaml.MappingNode]:
    """The mappings under `<<`, those of theirs too, the one that counts first."""
    for key, value in node.value:
        if key.tag == _MERGE:
            for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(item, yaml.MappingNode):
                    yield item
                    yield from _merged(item)


class _Variables:
    """Replaces the variables in a document's nodes, before they are made into values."""

    def __init__(self, loader: Loader, source: YamlSource) -> None:
        self._loader, self._source = loader, source
        self._done: dict[int, tuple[str, ...]] = {}
        self._deep: set[int] = set()
        self.problems: list[str] = []

    def replace(self, root: yaml.MappingNode) -> None:
        for key, value in root.value:
            if not str(key.value).startswith(_IGNORED):  # what nobody uses need not be set
                self._node(value, () if key.tag == _MERGE else (str(key.value),))

    def _node(self, node: yaml.Node, path: KeyPath) -> None:
        if path and path[-1] in LITERAL_KEYS:
            return
        if len(path) > _DEPTH and not isinstance(node, yaml.ScalarNode):
            if id(node) in self._deep:  # aliases of aliases of aliases would be walked for ever
                return
            self._deep.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self._node(value, path if key.tag == _MERGE else (*path, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._node(item, (*path, str(index)))
        elif isinstance(node, yaml.ScalarNode):
            self._scalar(node, path)

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> None:
        if id(node) not in self._done:  # an alias is the node that it names
            self._done[id(node)] = ()
            found = expand(node.value) if "${" in node.value else None
            if found is not None:
                self._done[id(node)] = found.used
                where = f"line {node.start_mark.line + 1}: {'.'.join(path)}: "
                if found.nested:
                    self.problems.append(where + nested_problem(found.nested))
                elif found.unset:
                    self.problems.append(where + unset_problem(found.unset))
                node.value = found.text
                if (
                    node.style is None and found.used
                ):  # unquoted: a number or a boolean, as if it had been written here
                    node.tag = self._loader.resolve(yaml.ScalarNode, node.value, (True, False))
        if used := self._done[id(node)]:
            for end in range(1, len(path) + 1):
                before = self._source.variables.get(path[:end], ())
                self._source.variables[path[:end]] = (*before, *(name for name in used if name not in before))
        if node.style is None and read_as_text_before(node.value):
            self._source.texts[path] = node.value


def _syntax(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    line = text.splitlines()[mark.line : mark.line + 1] if mark is not None else []
    hint = "; within [ ] and { } a ${...} stands in quotes" if line and "${" in line[0] else ""
    return f"{where}not valid YAML: {syntax_problem(error)}{hint}"
