"""Relative paths of a configuration: whose folder they start from, and which settings are paths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PATH_KEYS = frozenset(
    {
        ("model", "path"),
        ("data", "train"),
        ("data", "validation"),
        ("data", "test"),
        ("run", "output_dir"),
        ("checkpoint", "folder"),
        ("rollout", "sync_folder"),
        ("rollout", "sglang.endpoints"),
    }
)
FUNCTION_KEY = ("reward", "function")
PROGRAM_KEY = ("rollout", "sglang.python")


def absolute(key: tuple[str, str], value: Any, base: Path) -> Any:
    """`value` with its relative paths made absolute against `base`.

    Only the settings that hold paths are touched, and only strings in them: whatever else is wrong with the
    value is the schema's to say.
    """
    if key in PATH_KEYS:
        if isinstance(value, list):
            return [_join(item, base) for item in value]
        return _join(value, base)
    if key == PROGRAM_KEY and isinstance(value, str) and "/" in value:  # a bare name is looked up on PATH
        return _join(value, base)
    if key == FUNCTION_KEY and isinstance(value, str):
        file, colon, function = value.rpartition(":")
        if colon and file.endswith(".py"):
            return f"{_join(file, base)}:{function}"
    return value


def _join(value: Any, base: Path) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    return os.path.normpath(base.absolute() / Path(value).expanduser())
