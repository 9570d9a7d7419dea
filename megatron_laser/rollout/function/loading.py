"""The function that `rollout.function` names: found, imported, and checked before anything expensive."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_laser.config import RunConfig
from megatron_laser.errors import Finding, UserError
from megatron_laser.rewards.workers.user_code import definition, described
from megatron_laser.user_functions import attribute_of, import_file

RolloutFunction = Callable[..., Coroutine[Any, Any, object]]

_ARGUMENTS = "(engine, prompt, sampling, **rollout.function_options)"


class FunctionSpecError(UserError, ValueError):
    """`rollout.function` names no usable function."""


def load_function(spec: str, options: Mapping[str, Any]) -> RolloutFunction:
    """Import what `spec` names; runs the user's module in this process.

    Raises:
        FunctionSpecError: no such file, module or function, code that fails while it is imported, a function that is
            not async, or one that cannot be called with (engine, prompt, sampling, **options).
    """
    place, _, attribute = spec.rpartition(":")
    module = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
    function = attribute_of(module, attribute)
    if function is None:
        names = sorted(name for name, value in vars(module).items() if inspect.iscoroutinefunction(value))
        raise _error(spec, f"{place} has no {attribute!r}; its async functions: {', '.join(names) or 'none'}")
    check_signature(spec, function, options)
    return function  # type: ignore[return-value]


def check_signature(spec: str, function: object, options: Mapping[str, Any]) -> None:
    """Raises FunctionSpecError unless `function` is async and takes the three arguments and the options."""
    if not callable(function):
        raise _error(spec, f"is of type {type(function).__name__}, not a function")
    at = f" ({place})" if (place := definition(function)) else ""
    call = function if inspect.isroutine(function) else type(function).__call__  # a callable object's
    if inspect.isasyncgenfunction(call):
        raise _error(spec, f"is an async generator{at}: it must return one sample, not yield")
    if not inspect.iscoroutinefunction(call):
        raise _error(spec, f"is not async{at}: define it with `async def`, and await engine.generate")
    try:
        inspect.signature(function).bind("engine", "prompt", "sampling", **options)
    except TypeError as error:
        raise _error(
            spec,
            f"cannot be called with {_ARGUMENTS}{at}: {error}; it is defined as {inspect.signature(function)}",
        ) from None


def function_findings(config: RunConfig) -> list[Finding]:
    """One finding about `rollout.function`; none where it is null. Does not call it: there is no engine yet."""
    spec = config.rollout.function
    if spec is None:
        return []
    try:
        load_function(spec, config.rollout.function_options)
    except FunctionSpecError as error:
        return [Finding("rollout function", "error", str(error))]
    return [Finding("rollout function", "ok", f"{spec}, async, takes {_ARGUMENTS}")]


def _load_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except BaseException as error:  # SystemExit, too: user code may do anything while it is imported
        raise _error(spec, f"importing {name!r} failed: {described(error)}") from error


def _load_file(spec: str, path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise _error(spec, f"there is no file {path}")
    # What lies beside it can be imported; last, so that a file there hides no installed package.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        return import_file(path)
    except BaseException as error:
        raise _error(spec, f"running {path} failed: {described(error)}") from error


def _error(spec: str, problem: str) -> FunctionSpecError:
    return FunctionSpecError(
        f"rollout.function {spec!r}: {problem}. Expected 'path/to/file.py:function' or 'package.module:function' of an "
        f"async function that takes {_ARGUMENTS}"
    )
