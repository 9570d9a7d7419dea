"""YAML as this project reads and writes it: the numbers and booleans of YAML 1.2's core schema.

PyYAML follows YAML 1.1, in which 010 is 8, 1:30 is 90, `on` is true and 1e-6 is text. Every file and every
`key=value` of ours is read here, and whatever is written here is read back equal, by a reader of YAML 1.1 too.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import yaml

from megatron_laser.config.variables import escaped

_PREFIX = "tag:yaml.org,2002:"
# YAML 1.2.2, section 10.3.2: tag -> (what a plain scalar looks like, its first characters).
_CORE = {
    "null": (r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    "float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    "merge": (r"^(?:<<)$", "<"),  # of 1.1, and what anchors are for
}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's core schema; refuses a key that a table has twice, and what holds itself.

    twice: (key, its line, the line of the first) of such keys, for a reader of nodes, to whom they are not refused.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.twice: list[tuple[str, int, int]] = []
        self._open: list[str | None] = []  # anchors of what is being read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """An alias within what it names would have every reader walk for ever."""
        if self.check_event(yaml.AliasEvent) and (event := self.peek_event()).anchor in self._open:
            problem = f"what has the anchor &{event.anchor} holds itself (*{event.anchor})"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        """A list."""
        self._open.append(anchor)
        node = super().compose_sequence_node(anchor)
        self._open.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A table."""
        self._open.append(anchor)
        node = super().compose_mapping_node(anchor)
        self._open.pop()
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines and key.tag != _PREFIX + "merge":
                self.twice.append((name[1], line, lines[name]))
            lines.setdefault(name, line)
        return node

    def get_single_data(self) -> Any:
        """What the one document holds."""
        node = self.get_single_node()
        if self.twice:
            key, line, before = self.twice[0]
            raise yaml.composer.ComposerError(
                None, None, f"{key} is given twice, on lines {before} and {line}"
            )
        return None if node is None else self.construct_document(node)


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes what a reader of YAML 1.1 or 1.2 would take for something else than text."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {  # type: ignore[misc]
        key: list(items) for key, items in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, (_pattern, _first) in _CORE.items():
    for _class in (Loader, Dumper):
        # Of an empty scalar PyYAML asks for the first character "".
        _class.add_implicit_resolver(
            _PREFIX + _name, re.compile(_pattern), ["" if one == "\0" else one for one in _first]
        )


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    try:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    except ValueError:
        raise _no_number(node) from None


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    if text.lstrip("+-") == ".inf":
        return -math.inf if text.startswith("-") else math.inf
    if text == ".nan":
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise _no_number(node) from None


def _boolean(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool:
    if (text := node.value.lower()) in ("true", "false"):
        return bool(text == "true")
    raise yaml.constructor.ConstructorError(
        None, None, f"{node.value!r} is neither true nor false", node.start_mark
    )


def _no_type(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    name = node.tag.removeprefix(_PREFIX)
    raise yaml.constructor.ConstructorError(None, None, f"!!{name} is no type of YAML 1.2", node.start_mark)


def _no_number(node: yaml.ScalarNode) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, f"{node.value!r} is no number", node.start_mark)


Loader.add_constructor(_PREFIX + "int", _whole)
Loader.add_constructor(_PREFIX + "float", _number)
Loader.add_constructor(_PREFIX + "bool", _boolean)
Loader.add_constructor(_PREFIX + "timestamp", _no_type)


def yaml_value(text: str) -> Any:
    """What `text` is in YAML 1.2, for example of "section.key=TEXT".

    Raises:
        yaml.YAMLError, RecursionError: it is no valid YAML; `syntax_problem` says what is wrong.
    """
    return yaml.load(text, Loader)


def yaml_text(data: Any, *, flow: bool | None = False, width: int = 110) -> str:
    """`data` as YAML that `read_yaml` gives back equal: a `${NAME}` that stands in a text is escaped."""
    return yaml.dump(
        escaped(data),
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=width,
        default_flow_style=flow,
    )


def one_line(value: Any) -> str:
    """`value` in YAML on one line, as one would type it behind "section.key="; nothing in it is escaped."""
    text = yaml.dump(
        value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def read_as_text_before(text: str) -> bool:
    """Whether YAML 1.1 has a plain scalar as text that is a number in YAML 1.2: 1e5, 08, 0o10."""
    old = yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], [])
    number = any(re.match(_CORE[name][0], text) for name in ("int", "float"))
    return number and not any(pattern.match(text) for _, pattern in old)


def syntax_problem(error: yaml.YAMLError | RecursionError) -> str:
    """What is wrong with a text, in one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
