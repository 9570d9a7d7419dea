"""Text that is none: half of a surrogate pair, which JSON can write (\\ud83d) and no tokenizer or file can take."""

from __future__ import annotations

import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")


def lone_surrogate(value: Any, name: str = "") -> str:
    """What is wrong, in words, where a string of a JSON value holds half of a surrogate pair; "" where none does.

    Args:
        value: a text, or what JSON gave; keys of objects count as well.
        name: what the value is called; places below it are named like `messages[1].content`.
    """
    rest: list[tuple[str, Any]] = [(name, value)]  # no recursion: JSON may nest deeper than Python calls
    while rest:
        place, item = rest.pop()
        if isinstance(item, str):
            if not item.isascii() and (found := _SURROGATE.search(item)):
                where = f" in `{place}`" if place else ""
                return (
                    f"half of a surrogate pair (\\u{ord(found.group()):04x}, character {found.start() + 1}{where}), "
                    "which is not text: an emoji that was cut in two"
                )
        elif isinstance(item, dict):
            for key, inner in reversed(item.items()):
                rest.append((f"{place}.{key}" if place else str(key), inner))
            rest += [(place, key) for key in item if isinstance(key, str)]
        elif isinstance(item, (list, tuple)):
            rest += [(f"{place}[{index}]", inner) for index, inner in reversed(list(enumerate(item)))]
    return ""
