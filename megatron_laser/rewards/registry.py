"""Reward functions by name, by `package.module:function` or by `path/to/file.py:function`.

A reward function takes (response: str, answer: str) and returns a number from 0 to 1 or a `Grade`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from .grade import Grade, RewardSpecError
from .math_grading import grade_math

RewardFunction = Callable[[str, str], "float | Grade"]

_FILE_MODULE_PREFIX = "megatron_laser_reward_file_"
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

    Raises:
        RewardSpecError: unknown name, module, file or function; the message lists the known names.
    """
    if not isinstance(spec, str):
        reward_location(spec)
        return spec
    place, separator, attribute = spec.rpartition(":")
    if not separator:
        if spec in _registered:
            return _registered[spec]
        near = difflib.get_close_matches(spec, known_rewards(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise _spec_error(spec, f"no reward of this name is registered.{hint}")
    if not place or not attribute:
        raise _spec_error(spec, "one side of ':' is empty.")
    module = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
    function: object = module
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if function is None:
        names = sorted(name for name, value in vars(module).items() if inspect.isfunction(value))
        raise _spec_error(spec, f"{place} has no {attribute!r}; its functions: {', '.join(names) or 'none'}.")
    if not callable(function):
        raise _spec_error(spec, f"{attribute!r} is a {type(function).__name__}, not a function.")
    _check_signature(spec, function)
    return function


def is_math_verify(spec: str | RewardFunction) -> bool:
    """Whether this is the built-in verifier, which needs no code of the user."""
    return spec is grade_math or spec in ("math_verify", f"{grade_math.__module__}:{grade_math.__name__}")


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
    if module == "__main__" or module.startswith(_FILE_MODULE_PREFIX):
        source = getattr(sys.modules.get(module), "__file__", None)
        if source is None:
            raise RewardSpecError(f"reward function {name!r} was typed interactively: put it into a .py file")
        return f"{Path(source).resolve()}:{name}"
    return f"{module}:{name}"


def _load_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _spec_error(spec, f"importing {name!r} failed: {type(error).__name__}: {error}.") from error


def _load_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise _spec_error(spec, f"there is no file {path.resolve()}.")
    path = path.resolve()
    name = _FILE_MODULE_PREFIX + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.util.spec_from_file_location(name, path)
    if loader is None or loader.loader is None:
        raise _spec_error(spec, f"{path} cannot be loaded as Python.")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _spec_error(spec, f"running {path} failed: {type(error).__name__}: {error}.") from error
    return module


def _check_signature(spec: str, function: Callable[..., object]) -> None:
    try:
        inspect.signature(function).bind("response", "answer")
    except TypeError as error:
        raise _spec_error(spec, f"it must take (response, answer): {error}.") from error
    except ValueError:  # builtins without a signature
        return


def _spec_error(spec: str, problem: str) -> RewardSpecError:
    return RewardSpecError(
        f"reward.function {spec!r}: {problem} Expected a registered name ({', '.join(known_rewards())}), "
        "'package.module:function' or 'path/to/file.py:function'."
    )


register_reward("math_verify")(grade_math)
