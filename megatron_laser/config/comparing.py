"""What differs between two configurations, as a person would say it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config.loading import load_config
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.showing import settings
from megatron_laser.config.yaml_text import one_line
from megatron_laser.errors import ConfigError

CONFIG = "config.yaml"
WHERE_WRITTEN = frozenset(
    {"run.output_dir", "run.name", "checkpoint.folder", "rollout.sync_folder", "rollout.sglang.endpoints"}
)
"""Settings that change where things stand, not what is learned."""
_FOR_SELF_REWARD = frozenset(
    f"laser.{key}"
    for key in (
        *("alpha", "tau", "std_threshold", "reasoning_warmup_steps", "self_reward_warmup_steps"),
        *("unscored", "class_weights", "loss"),
    )
)
_ABSENT = object()
_NAMES = ("name", "path")  # what an element of a list is known by


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting, or a part of one (`data.train[deepmath].weight`), in the words that are shown.

    setting: "section.key" to which it belongs.
    """

    setting: str
    name: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """learned: settings that change the run. idle: such as have no effect while laser.enabled is false. written: where
    things are written."""

    learned: list[Difference]
    idle: list[Difference]
    written: list[Difference]

    def __bool__(self) -> bool:
        return bool(self.learned or self.idle or self.written)

    def lines(self) -> list[str]:
        """For the terminal: one line a difference, section by section; none where there is none."""
        listed = [*self.learned, *self.idle, *self.written]
        width = min(48, max((len(one.name) for one in listed), default=0))
        lines = [_line(one, width) for one in self.learned]
        for title, some in (
            ("without effect where laser.enabled is false:", self.idle),
            ("where things are written:", self.written),
        ):
            if some:
                lines += [*([""] if lines else []), title, *(_line(one, width) for one in some)]
        return lines


def read_either(path: str | Path) -> RunConfig:
    """The configuration of a YAML file, or of a run's output folder.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ConfigError(
                [f"no {CONFIG} in this folder; expected a run's output folder or a YAML file"], str(path)
            )
        path = path / CONFIG
    return load_config(path)


def compare(a: RunConfig, b: RunConfig) -> Comparison:
    """All settings, defaults included: what was given in one and is the other's default is no difference."""
    found = Comparison([], [], [])
    off = not (a.laser.enabled and b.laser.enabled)
    for (section, key, old), (_, _, new) in zip(settings(a), settings(b), strict=True):
        name = f"{section}.{key}"
        for part, left, right in _differences(name, old, new):
            kind = (
                found.written
                if name in WHERE_WRITTEN
                else found.idle
                if off and name in _FOR_SELF_REWARD
                else found.learned
            )
            kind.append(Difference(name, part, _words(left), _words(right)))
    return found


def _differences(name: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, a's, b's) of the smallest parts that differ."""
    if a == b and type(a) is type(b):
        return
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from _differences(f"{name}.{key}", a.get(key, _ABSENT), b.get(key, _ABSENT))
        return
    ours, theirs = _elements(a), _elements(b)
    if ours is not None and theirs is not None:
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            yield from _differences(f"{name}[{key}]", ours.get(key, _ABSENT), theirs.get(key, _ABSENT))
        return
    if a != b:
        yield name, a, b


def _elements(value: Any) -> dict[str, Any] | None:
    """A list of tables by what its elements are known by, their number where that is nothing or not unique."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return None
    names = [_known_by(item) for item in value]
    if any(name is None for name in names) or len(set(names)) < len(names):
        names = [str(index) for index in range(len(value))]
    return {str(name): item for name, item in zip(names, value, strict=True)}


def _known_by(item: dict[str, Any]) -> str | None:
    for key in _NAMES:
        value = item.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value:
            return Path(value).stem if key == "path" else value
    return None


def _words(value: Any) -> str:
    if value is _ABSENT:
        return "(not there)"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str) and os.path.isabs(value):
        near = os.path.relpath(value)
        return value if near.startswith("..") else near
    return one_line(value)


def _line(one: Difference, width: int) -> str:
    return f"{one.name:<{width}}  {one.a} -> {one.b}"
