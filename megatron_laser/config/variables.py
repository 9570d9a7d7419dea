"""`${NAME}` and `${NAME:default}` in the values of a YAML file: variables of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LITERAL_KEYS = frozenset({"prompt_suffix", "system_prompt"})
"""Settings whose text the model reads, in which `${x}$` is LaTeX: nothing is replaced in them."""

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_VARIABLE = re.compile(rf"(\$?)\$\{{({_NAME})(?::([^}}]*))?\}}")
_TO_ESCAPE = re.compile(rf"\$(?=\{{{_NAME}(?::[^}}]*)?\}})")


@dataclass(frozen=True, slots=True)
class Expanded:
    """A text with its variables replaced.

    used: the variables' names. unset: those that are not set and have no default. nested: those whose default holds
    another variable, which nobody would replace.
    """

    text: str
    used: tuple[str, ...]
    unset: tuple[str, ...]
    nested: tuple[str, ...] = ()


def expand(text: str, environment: Mapping[str, str] | None = None) -> Expanded:
    """Replace `${NAME}` and `${NAME:default}`; `$${NAME}` stays as `${NAME}`, and so does everything else with a $.

    A default is what stands between the first colon and the brace, and counts where the variable is not set.
    """
    environment = os.environ if environment is None else environment
    used: list[str] = []
    unset: list[str] = []
    nested: list[str] = []

    def value(match: re.Match[str]) -> str:
        escape, name, default = match.groups()
        if escape:
            return match.group()[1:]
        used.append(name)
        if "${" in (default or ""):
            nested.append(name)
        found = environment.get(name, default)
        if found is None:
            unset.append(name)
        return found or ""

    return Expanded(_VARIABLE.sub(value, text), tuple(used), tuple(unset), tuple(nested))


def unset_problem(names: tuple[str, ...]) -> str:
    """What is wrong with a value whose variables are not set, and what to do."""
    one = names[0]
    return (
        f"the environment variable {one} is not set; set it, or write ${{{one}:DEFAULT}} (for the text itself: "
        f"$${{{one}}})"
    )


def nested_problem(names: tuple[str, ...]) -> str:
    """What is wrong with a variable within another one's default."""
    return f"the default of ${{{names[0]}:...}} holds another ${{...}}, and a default is plain text; write a text there"


def escaped(data: Any) -> Any:
    """`data` with the `$` doubled wherever `expand` would replace something."""
    if isinstance(data, str):
        return _TO_ESCAPE.sub("$$", data)
    if isinstance(data, dict):
        return dict(_items(data))
    return [escaped(item) for item in data] if isinstance(data, list | tuple) else data


def _items(data: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in data.items():
        yield key, value if key in LITERAL_KEYS else escaped(value)
