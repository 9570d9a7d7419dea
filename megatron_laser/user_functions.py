"""The user's own functions, named in a setting as `path/to/file.py:function` or `package.module:function`.

Objectives run inside the trainer, on every rank, so they are loaded here; reward functions run in workers of their own
(`rewards.registry`), which import files in the same way.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_laser.errors import UserError

FILE_MODULE_PREFIX = "megatron_laser_user_file_"


class UserFunctionError(UserError, ValueError):
    """A setting names a function that cannot be loaded or called as it has to be."""


def split_system(name: str) -> tuple[str, str]:
    """`verl:` or `trl:` in front of a reward function's place, "" without one, and the place."""
    system, _, place = name.partition(":")
    return (f"{system}:", place) if system in ("verl", "trl") and ":" in place else ("", name)


def import_file(path: Path) -> ModuleType:
    """The module that `path` holds, run once in this process. Raises whatever its code raises."""
    path = path.resolve()
    name = FILE_MODULE_PREFIX + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def attribute_of(module: ModuleType, name: str) -> object:
    """What a module calls `name`, which may be dotted; None where there is none."""
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def load_function(setting: str, spec: str) -> Callable[..., Any]:
    """The function that `spec` names, whose module is imported into this process.

    Args:
        setting: the setting that it stands in, for messages.

    Raises:
        UserFunctionError: no such file, module or function; code that fails while it is imported.
    """
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name):
        raise UserFunctionError(
            f"{setting}: {spec!r}; expected 'path/to/file.py:function' or 'package.module:function'"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise UserFunctionError(f"{setting}: {spec!r}; there is no file {Path(place).resolve()}")
    try:
        module = import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except BaseException as error:  # SystemExit, too: user code may do anything while it is imported
        text = " ".join(str(error).split())[:500]
        raise UserFunctionError(
            f"{setting}: {spec!r}; importing {place} failed: {type(error).__name__}: {text}"
        ) from error
    function = attribute_of(module, name)
    if not callable(function):
        known = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise UserFunctionError(
            f"{setting}: {spec!r}; {place} has no function {name!r}; its functions: {', '.join(known) or 'none'}"
        )
    found: Callable[..., Any] = function
    return found


def bind(
    setting: str,
    function: Callable[..., Any],
    positional: int,
    *,
    known: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Callable[..., Any]:
    """`function` with its keyword arguments filled in, to be called with `positional` arguments.

    Args:
        known: settings that it gets if it has a parameter of that name.
        options: what the user gave for it, by name; they go before `known`.

    Raises:
        UserFunctionError: an option that it does not take, one that it needs and nobody gave, or another number of
            positional arguments.
    """
    parameters = inspect.signature(function).parameters
    named = list(parameters.values())[positional:]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named)
    names = {p.name for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    unknown = [name for name in options if name not in names and not takes_any]
    if unknown:
        takes = ", ".join(sorted(names)) or "none"
        raise UserFunctionError(
            f"{setting}: {_name(function)} takes no option {unknown[0]!r}; it takes {takes}"
        )
    arguments = {name: value for name, value in known.items() if name in names} | dict(options)
    try:
        inspect.signature(function).bind(*[None] * positional, **arguments)
    except TypeError as error:
        raise UserFunctionError(
            f"{setting}: {_name(function)}{inspect.signature(function)} cannot be called with {positional} arguments "
            f"and {', '.join(arguments) or 'no options'}: {error}"
        ) from None
    return partial(function, **arguments)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
