"""Where in the user's code something happened: one `file:line in function` for a message."""

from __future__ import annotations

import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

_DUMP_FRAME = re.compile(r'^\s+File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.+)$', re.MULTILINE)
_Frame = tuple[str, int, str]


def is_users_code(file: str) -> bool:
    """Whether `file` is neither this package's nor an installed one's nor the standard library's."""
    return file.endswith(".py") and not any(_resolved(file).is_relative_to(root) for root in _others_code())


def place_of(error: BaseException) -> str:
    """Where `error` was raised: the deepest line of the user's code; "" when there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames: list[_Frame] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append((code.co_filename, trace.tb_lineno, code.co_name))
        trace = trace.tb_next
    return _deepest(reversed(frames))


def place_in_dump(dump: str) -> str:
    """The same of what `faulthandler` wrote, deepest frame first."""
    return _deepest(
        (found["file"], int(found["line"]), found["name"]) for found in _DUMP_FRAME.finditer(dump)
    )


def definition(function: object) -> str:
    """Where `function` (or the class of a callable object) is defined, "" when that is not known."""
    plain = inspect.unwrap(function) if callable(function) else function
    code = getattr(plain, "__code__", None) or getattr(type(plain).__call__, "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def described(error: BaseException) -> str:
    """`Type: message (file:line in function)`, in one line; a message is cut off after 500 characters."""
    try:
        text = " ".join(str(error).split())[:500]
    except Exception:  # a class of the user's may say nothing of itself
        text = ""
    place = place_of(error)
    return f"{type(error).__name__}{': ' if text else ''}{text}{f' ({place})' if place else ''}"


def _deepest(frames: Iterable[_Frame]) -> str:
    for file, line, name in frames:
        if is_users_code(file):
            return f"{file}:{line}" + ("" if name == "<module>" else f" in {name}")
    return ""


@lru_cache(maxsize=512)
def _resolved(file: str) -> Path:
    return Path(file).resolve()


@lru_cache(maxsize=1)
def _others_code() -> tuple[Path, ...]:
    return tuple(_roots())


def _roots() -> Iterator[Path]:
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield Path(sysconfig.get_paths()[name]).resolve()
    yield Path(__file__).resolve().parents[2]  # this package
