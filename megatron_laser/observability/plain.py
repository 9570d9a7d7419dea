"""Values and files as everything here writes them: plain JSON, whole or not at all."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from megatron_laser.files import replace_file, through_links


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy and torch become Python numbers or lists, NaN and infinities None.

    Raises:
        TypeError: neither a number, text, None, nor an array or list of these.
    """
    if hasattr(value, "tolist"):  # numpy and torch, scalars too
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{type(value).__name__} is neither a number, text nor a list of these: {value!r:.80}")


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 `text` so that `path` is the old file or the complete new one, never a part of it.

    A link is kept: the file that it points to is replaced.
    """
    path = through_links(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
