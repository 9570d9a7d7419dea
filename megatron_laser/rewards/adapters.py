"""Reward functions as they are written for verl and for TRL, called for one response at a time."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from megatron_laser.rewards.arguments import ArgumentsError, Bound, bind_native
from megatron_laser.rewards.grade import Grade, python_scalar
from megatron_laser.rewards.terms import REWARD
from megatron_laser.user_functions import split_system

Kind = Literal["native", "verl", "trl"]

_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_TRL_ONLY = ("completion_ids", "trainer_state")


def split_kind(spec: str) -> tuple[Kind | None, str]:
    """`verl:` or `trl:` in front of a function's place, None without one, and the place."""
    system, place = split_system(spec)
    return (system.removesuffix(":") or None), place  # type: ignore[return-value]


def kind_by_names(function: Callable[..., object]) -> Kind:
    """Whose signature a function has."""
    try:
        names = set(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return "native"
    if "solution_str" in names:
        return "verl"
    return "trl" if "completions" in names else "native"


def bind(function: Callable[..., object], kind: Kind) -> Bound:
    """The function with its arguments chosen. Raises ArgumentsError for one that takes something else."""
    return {"native": bind_native, "verl": _bind_verl, "trl": _bind_trl}[kind](function)


def _bind_verl(function: Callable[..., object]) -> Bound:
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info=None)`, or some of these."""
    taken, strange = _accepted(function, _VERL)
    if strange:
        raise ArgumentsError(f"takes `{strange[0]}`, which is none of verl's {', '.join(_VERL)}")

    def call(response: str, answer: str, facts: Mapping[str, Any]) -> object:
        row = _row(facts)
        model = row.get("reward_model")
        truth = model.get("ground_truth", answer) if isinstance(model, dict) else answer
        given = {
            "data_source": row.get("data_source", ""),
            "solution_str": response,
            "ground_truth": truth,
            "extra_info": row.get("extra_info") or {},
        }
        return _from_verl(function(**{name: given[name] for name in _VERL if name in taken}))

    return Bound(frozenset({"row"}), call)


def _from_verl(value: object) -> object:
    """A dict with `score` as a Grade: `pred` is the answer for votes, other numbers are terms, other texts nothing."""
    if not isinstance(value, Mapping):
        return value
    if "score" not in value:
        raise TypeError(
            f"a dict of verl's has `score`, and this one has {', '.join(map(str, value)) or 'nothing'}"
        )
    score = python_scalar(value["score"])
    if not isinstance(score, bool | int | float):
        raise TypeError(f"`score` of verl's dict is a number, not {score!r:.60} ({type(score).__name__})")
    score = float(score)
    rest = {
        str(name): python_scalar(item)
        for name, item in value.items()
        if name not in ("score", "pred", REWARD)
    }
    terms = {name: float(item) for name, item in rest.items() if isinstance(item, bool | int | float)}
    answer = value.get("pred")
    return Grade(
        score,
        "correct" if score > 0.5 else "wrong",
        answer if isinstance(answer, str) else None,
        terms or None,
    )


def _bind_trl(function: Callable[..., object]) -> Bound:
    """TRL's `fn(prompts, completions, **columns)`: lists of one, and a list of one number, or None, comes back."""
    columns_wanted, _ = _accepted(function, None)
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    required = [name for name in columns_wanted if parameters[name].default is inspect.Parameter.empty]
    if wanted := [name for name in _TRL_ONLY if name in required]:
        raise ArgumentsError(f"takes `{wanted[0]}`, which TRL's trainer has and nothing here")

    def call(response: str, answer: str, facts: Mapping[str, Any]) -> object:
        row = _row(facts)
        prompt = facts.get("prompt", "")
        chat = _conversation(row, prompt)
        columns = {
            name: item
            for name, item in row.items()
            if name not in ("prompt", "completion", "prompts", "completions")
        }
        columns.setdefault("answer", answer)
        given: dict[str, Any] = {
            name: [item] for name, item in columns.items() if takes_all or name in columns_wanted
        }
        given["completions"] = [response if chat is None else [{"role": "assistant", "content": response}]]
        given["prompts"] = [prompt if chat is None else chat]
        if missing := [name for name in required if name not in given]:
            raise ArgumentsError(
                f"the function takes `{missing[0]}`, and the data's row has no such column (it has "
                f"{', '.join(columns)})"
            )
        if "prompts" not in columns_wanted and not takes_all:
            del given["prompts"]
        return _from_trl(function(**given))

    return Bound(frozenset({"row", "prompt"}), call)


def _from_trl(value: object) -> object:
    found = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(found, list | tuple) or len(found) != 1:
        raise TypeError(
            f"for one completion TRL's functions return a list of one number or None, not {value!r:.60} "
            f"({type(value).__name__})"
        )
    return {REWARD: None} if found[0] is None else found[0]


def _conversation(row: Mapping[str, Any], problem: str) -> list[dict[str, Any]] | None:
    """The column that is the prompt's conversation; None where the prompt is a text."""
    for item in row.values():
        if isinstance(item, list) and item and all(isinstance(turn, dict) for turn in item):
            last = item[-1]
            if last.get("role") == "user" and last.get("content") == problem:
                return item
    return None


def _accepted(function: Callable[..., object], known: tuple[str, ...] | None) -> tuple[list[str], list[str]]:
    """The names that it takes (with **kwargs: all that are known), and those it needs that are not known."""
    parameters = inspect.signature(function).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, parameter in parameters.items() if parameter.kind not in variable]
    if known is None:
        return named, []
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        taken = list(known)
    else:
        taken = [name for name in named if name in known]
    empty = inspect.Parameter.empty
    return taken, [name for name in named if name not in known and parameters[name].default is empty]


def _row(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The row, or {} where it is not known: these functions have other ways to be told the reference."""
    row: dict[str, Any] = json.loads(facts["row"]) if facts.get("row") else {}
    return row
