"""Settings that are tables of the user's own names: a dotted name may lead to one of their entries."""

from __future__ import annotations

from typing import Any

from megatron_laser.config.yaml_source import KeyPath

TERMS_KEY = ("reward", "terms")
TABLE_KEYS = frozenset(
    {
        ("rollout", "function_options"),
        ("data", "chat_template_arguments"),
        ("policy", "loss_options"),
        ("policy", "advantage_options"),
        TERMS_KEY,
    }
)


def with_entry(path: KeyPath, value: Any, given: Any) -> tuple[KeyPath, Any]:
    """(the table's name, the table `given` with one more entry); `path` and `value` as they are where it leads to none.

    Of a term of the reward `weight` and `function` can be set alone; its name may hold dots.
    """
    table = given if isinstance(given, dict) else {}
    if path[:2] != TERMS_KEY:
        return (path[:2], {**table, path[2]: value}) if len(path) == 3 else (path, value)
    if len(path) == 3 or path[-1] not in ("weight", "function"):
        return TERMS_KEY, {**table, ".".join(path[2:]): value}
    name = ".".join(path[2:-1])
    old = table.get(name, {})
    return TERMS_KEY, {
        **table,
        name: {**(old if isinstance(old, dict) else {"weight": old}), path[-1]: value},
    }
