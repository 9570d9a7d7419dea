"""Reward functions by name, by `package.module:function` or by `path/to/file.py:function`.

A reward function takes some of `arguments.ARGUMENTS`, (response, answer) most often, and returns a number, a `Grade` or
a dict of named terms (`terms`). Functions written for verl or TRL are called as these do (`adapters`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from megatron_laser.rewards.adapters import bind, kind_by_names, split_kind
from megatron_laser.rewards.arguments import ArgumentsError, Bound
from megatron_laser.rewards.general.choices import multiple_choice
from megatron_laser.rewards.general.short_text import free_text
from megatron_laser.rewards.grade import RewardSpecError
from megatron_laser.rewards.mathematics.grading import grade_math
from megatron_laser.rewards.workers.user_code import definition, described
from megatron_laser.user_functions import FILE_MODULE_PREFIX, attribute_of, import_file

RewardFunction = Callable[..., object]

_LISTS = {"queries": "OpenRLHF's", "solution_strs": "verl's batch"}
"""A parameter by which a function is known that takes many responses at once, and whose it is."""
_COLUMNS = {
    "native": ". A column of the data is row['its name']",
    "verl": ". A column of the data is in extra_info['its name'] where verl's preparation has put it there",
    "trl": ". A column of the data is a parameter of its name",
}

_registered: dict[str, RewardFunction] = {}


def register_reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: makes a module-level function available as `reward.function: NAME`.

    Raises:
        RewardSpecError: the name is taken by another function, holds ':', or the function cannot be imported
            by a worker process (a lambda, or defined inside a function).
    """
    if not name or ":" in name:
        raise RewardSpecError(f"a registered reward's name is not empty and has no ':', but is {name!r}")

    def register(function: RewardFunction) -> RewardFunction:
        location = reward_location(function)
        known = _registered.get(name)
        if known is not None and reward_location(known) != location:
            raise RewardSpecError(
                f"reward {name!r} is already registered by {reward_location(known)}; "
                f"{location} needs another name"
            )
        _registered[name] = function
        return function

    return register


def known_rewards() -> list[str]:
    """The registered names, sorted."""
    return sorted(_registered)


def resolve_reward(spec: str | RewardFunction) -> RewardFunction:
    """The function that `reward.function` names; relative paths are relative to the working directory.

    Runs the user's module in this process: grading workers do that, the trainer does not (see `locate_reward`).

    Raises:
        RewardSpecError: unknown name, module, file or function, code that fails while it is imported, or a function
            that takes something that it is not given.
    """
    if not isinstance(spec, str):
        reward_location(spec)
        return spec
    place, attribute = _split(split_kind(spec)[1])
    if not place:
        return _registered[attribute]
    module = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
    function = attribute_of(module, attribute)
    if function is None:
        names = sorted(name for name, value in vars(module).items() if inspect.isfunction(value))
        raise _spec_error(spec, f"{place} has no {attribute!r}; its functions: {', '.join(names) or 'none'}.")
    if not callable(function):
        raise _spec_error(spec, f"{attribute!r} is of type {type(function).__name__}, not a function.")
    bind_reward(spec, function)
    return function


def locate_reward(spec: str | RewardFunction) -> str:
    """Where a worker finds what `spec` names, as `reward_location` writes it, without running anything of the user's.

    Raises:
        RewardSpecError: an unknown name, a file that is not there, or a function that cannot be imported by name.
    """
    if not isinstance(spec, str):
        return reward_location(spec)
    kind, spec = split_kind(spec)
    place, attribute = _split(spec)
    prefix = "" if kind is None else f"{kind}:"
    if not place:
        return reward_location(_registered[attribute])
    if not place.endswith(".py"):
        return f"{prefix}{spec}"
    path = Path(place).resolve()
    if not path.is_file():
        raise _spec_error(spec, f"there is no file {path}.")
    return f"{prefix}{path}:{attribute}"


def _split(spec: str) -> tuple[str, str]:
    """Module or file, and the function's name; ("", name) for a registered one."""
    place, separator, attribute = spec.rpartition(":")
    if separator and (not place or not attribute):
        raise _spec_error(spec, "one side of ':' is empty.")
    if not separator and spec not in _registered:
        near = difflib.get_close_matches(spec, known_rewards(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise _spec_error(spec, f"no reward of this name is registered.{hint}")
    return place, attribute


def is_math_verify(spec: str | RewardFunction) -> bool:
    """Whether this is the built-in verifier, which needs no code of the user."""
    name = grade_math.__name__
    return spec is grade_math or spec in (
        "math_verify",
        f"{__package__}:{name}",
        f"{grade_math.__module__}:{name}",
    )


def reward_location(function: RewardFunction) -> str:
    """Where another process finds the function: `module:name`, or `/path/file.py:name`.

    Raises:
        RewardSpecError: it cannot be imported by name.
    """
    name = getattr(function, "__qualname__", None)
    module = getattr(function, "__module__", None)
    if not callable(function) or not name or not module or "<" in name:
        raise RewardSpecError(
            f"reward function {function!r} cannot be imported by the grading workers: "
            "define it with def at the top level of a module"
        )
    if module == "__main__" or module.startswith(FILE_MODULE_PREFIX):
        source = getattr(sys.modules.get(module), "__file__", None)
        if source is None:
            raise RewardSpecError(f"reward function {name!r} was typed interactively: put it into a .py file")
        return f"{Path(source).resolve()}:{name}"
    return f"{module}:{name}"


def _load_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except BaseException as error:  # SystemExit, too: user code may do anything while it is imported
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            near = Path(*name.split(".")).with_suffix(".py")
            where = f" The file is here: write {near}:{spec.rpartition(':')[2]}." if near.is_file() else ""
            hint = f" It is neither installed nor in PYTHONPATH.{where}"
        raise _spec_error(spec, f"importing {name!r} failed: {described(error)}.{hint}") from error


def _load_file(spec: str, path: Path) -> ModuleType:
    path = path.resolve()
    try:
        return import_file(path)
    except BaseException as error:
        if isinstance(error, FileNotFoundError) and not path.is_file():
            raise _spec_error(spec, f"there is no file {path}.") from None
        raise RewardSpecError(
            f"reward.function {spec!r}: running {path} failed: {described(error)}"
        ) from error


def bind_reward(spec: str, function: Callable[..., object]) -> Bound:
    """How `function` is called for one response, by the prefix of `spec` or by the function's signature.

    Raises:
        RewardSpecError: it takes something that it is not given, or would not return at once.
    """
    named = f"reward.function {spec!r}{f' ({place})' if (place := definition(function)) else ''}"
    call = function if inspect.isroutine(function) else type(function).__call__  # a callable object's
    if inspect.iscoroutinefunction(call):
        raise RewardSpecError(
            f"{named} is async and would return a coroutine, not a reward: define it with `def`, and use asyncio.run "
            "inside where it has to await something"
        )
    if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise RewardSpecError(f"{named} is a generator: it must return one number, not yield")
    kind = split_kind(spec)[0] or kind_by_names(function)
    try:
        return bind(function, kind)
    except ArgumentsError as error:
        signature = inspect.signature(function)
        lists = next((whose for name, whose in _LISTS.items() if name in signature.parameters), "")
        if lists:
            hint = f". This is {lists} signature, with lists: define `def reward(response, answer)` for one response"
        else:
            hint = _COLUMNS[kind]
        raise RewardSpecError(f"{named} {error}; it is defined as {signature}{hint}") from None


def _spec_error(spec: str, problem: str) -> RewardSpecError:
    return RewardSpecError(
        f"reward.function {spec!r}: {problem} Expected a registered name ({', '.join(known_rewards())}), "
        "'package.module:function' or 'path/to/file.py:function'; verl: or trl: in front where it is written for these."
    )


register_reward("math_verify")(grade_math)
register_reward("multiple_choice")(multiple_choice)
register_reward("free_text")(free_text)
