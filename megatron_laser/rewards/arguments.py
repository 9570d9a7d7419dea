"""What a reward function may be told of a response, which it asks for by the names of its parameters."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS = ("prompt", "row", "finish_reason", "num_tokens")
"""What is sent to a worker only where its function asks for it."""
ARGUMENTS = ("response", "answer", *FACTS)

Call = Callable[[str, str, Mapping[str, Any]], object]
"""A function with its arguments chosen: (response, answer, facts as they were sent)."""


class ArgumentsError(TypeError):
    """A function asks for something that nobody gives it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a response besides its text and its reference.

    Attributes:
        prompt: the problem as in the data; of a conversation the last turn's text.
        row: the row of the data file as a JSON object; "": not read.
        finish_reason: stop, length, or ended.
        num_tokens: of the response, with the token that ended it.
    """

    prompt: str
    row: str
    finish_reason: str
    num_tokens: int

    def message(self, needs: Collection[str]) -> dict[str, Any]:
        """What of it is sent to a worker whose functions need that."""
        return {name: getattr(self, name) for name in FACTS if name in needs}


@dataclass(frozen=True, slots=True)
class Bound:
    """needs: which of `FACTS` the call reads."""

    needs: frozenset[str]
    call: Call


def fact(facts: Mapping[str, Any], name: str) -> Any:
    """One of them, a row as a dict of its own. Raises ArgumentsError where it is not known."""
    if name not in facts or (name == "row" and not facts[name]):
        raise ArgumentsError(f"the function takes `{name}`, which is not known of this response here")
    return json.loads(facts[name]) if name == "row" else facts[name]


def bind_native(function: Callable[..., object]) -> Bound:
    """A function that takes some of `ARGUMENTS`, by their names.

    Its first two parameters may have other names: they are then the response and the reference, in this order. Where
    their names, or a later `response` or `answer`, say that they are not, it is refused: (question, response, answer).

    Raises:
        ArgumentsError: it takes something else, or nothing of it.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # builtins without a signature
        return Bound(frozenset(), lambda response, answer, facts: function(response, answer))
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    positional = [n for n, kind in kinds.items() if kind in (inspect.Parameter.POSITIONAL_ONLY, _EITHER)]
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds.values()
    first: tuple[str, ...] = ()
    unknown = [n for n in positional[:2] if n not in ARGUMENTS] if "answer" not in positional[1:] else []
    unknown += [n for n in positional[:1] if n not in (*ARGUMENTS, *unknown)]
    only_by_place = [n for n in positional if kinds[n] is inspect.Parameter.POSITIONAL_ONLY]
    if unknown or only_by_place or (not positional and inspect.Parameter.VAR_POSITIONAL in kinds.values()):
        first = ("response", "answer")
    rest = [n for n in kinds if n not in positional[: len(first)]]
    named = [n for n in rest if n in ARGUMENTS and kinds[n] in (_EITHER, inspect.Parameter.KEYWORD_ONLY)]
    if takes_all:
        # what is in a parameter of another name already cannot be given once more
        named = [name for name in ARGUMENTS if name not in first]
    strange = [n for n in rest if n not in ARGUMENTS and _required(parameters[n])]
    if unknown or only_by_place:
        strange += _misplaced(positional, kinds)
    if strange or (first and len(positional) < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds.values()):
        named_so = list(dict.fromkeys(strange or unknown))
        raise ArgumentsError(
            f"takes {_ticks(named_so)}, which {'is' if len(named_so) == 1 else 'are'} none of {', '.join(ARGUMENTS)}"
        )
    if not first and not named:
        raise ArgumentsError(f"takes none of {', '.join(ARGUMENTS)}")

    def call(response: str, answer: str, facts: Mapping[str, Any]) -> object:
        texts = {"response": response, "answer": answer}
        given = {name: texts[name] if name in texts else fact(facts, name) for name in named}
        return function(*(texts[name] for name in first), **given)

    return Bound(frozenset(named) & frozenset(FACTS), call)


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _misplaced(positional: list[str], names: Collection[str]) -> list[str]:
    """Which parameters would get the response or the reference although the names tell otherwise."""
    wrong = [
        name
        for name, right in zip(positional, ("response", "answer"), strict=False)
        if name in ARGUMENTS and name != right
    ]
    later = [name for name in ("response", "answer") if name in names and name not in positional[:2]]
    strangers = [name for name in positional[:2] if name not in ARGUMENTS]
    return (strangers or wrong) if wrong or later else []


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty and parameter.kind not in _VARIABLE


def _ticks(names: Collection[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def may_want_row(spec: str) -> bool:
    """Whether the function that `spec` names may ask for the row, without running any of its code.

    False only where its definition is found and shows that it does not: rows are kept in memory for those that may.
    """
    place, _, name = spec.rpartition(":")
    if not place:
        return False  # a registered one
    kind, colon, rest = place.partition(":")
    path = _source(rest if colon and kind in ("verl", "trl") else place)
    if path is None or (colon and kind in ("verl", "trl")):
        return True
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, ValueError, SyntaxError):
        return True
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(found) != 1 or found[0].decorator_list or found[0].args.kwarg is not None:
        return True
    taken = found[0].args
    names = {argument.arg for argument in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)}
    return bool(names & {"row", "solution_str", "completions"})


def _source(place: str) -> Path | None:
    if place.endswith(".py"):
        return Path(place)
    relative = Path(*place.split(".")).with_suffix(".py")
    return next((file for entry in sys.path if (file := Path(entry or ".") / relative).is_file()), None)
