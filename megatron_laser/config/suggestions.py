"""What a misspelt or misplaced key probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from megatron_laser.config.schema import key_paths


def suggest_key(path: Sequence[str]) -> str:
    """A hint for the unknown key `path`, such as "did you mean `optimizer.lr`?".

    Looks for the same name in another section, then for a similar name in the same section, then for a
    similar name anywhere; lists the section's keys when nothing is near.
    """
    sections = key_paths()
    if path[0] not in sections:
        near = difflib.get_close_matches(path[0], sections, n=1, cutoff=0.6)
        if near and (len(path) == 1 or path[1] in sections[near[0]]):
            return _did_you_mean([".".join([near[0], *path[1:]])])
        return _elsewhere(path[-1]) or (
            _did_you_mean(near) if near else f"the sections are {', '.join(sections)}"
        )
    if len(path) == 1:
        return f"the keys of {path[0]} are {', '.join(sections[path[0]])}"
    section, key = path[0], path[1]
    if len(path) > 2:
        if key in sections[section]:
            return f"{section}.{key} is a setting, not a section; did you mean `{section}.{key}`?"
        return f"keys have the form section.key; {suggest_key(path[:2])}"
    exact = [f"{other}.{key}" for other, keys in sections.items() if key in keys]
    if exact:
        return _did_you_mean(exact)
    near = difflib.get_close_matches(key, sections[section], n=1, cutoff=0.6)
    part = [name for name in sections[section] if len(key) >= 3 and (key in name or name in key)]
    begun = [name for name in part if name.startswith(key)]  # `samples` is the start of samples_per_prompt
    if begun or near or part:
        return _did_you_mean([f"{section}.{name}" for name in begun or near or part])
    return _elsewhere(key) or f"the keys of {section} are {', '.join(sections[section])}"


def _elsewhere(key: str) -> str:
    """A hint to the nearest key of any section, or "" when none is near."""
    owners: dict[str, list[str]] = {}
    for section, keys in key_paths().items():
        for name in keys:
            owners.setdefault(name, []).append(f"{section}.{name}")
    near = difflib.get_close_matches(key, owners, n=1, cutoff=0.7)
    return _did_you_mean(owners[near[0]]) if near else ""


def _did_you_mean(names: Sequence[str]) -> str:
    return "did you mean " + " or ".join(f"`{name}`" for name in names) + "?"
