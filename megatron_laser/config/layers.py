"""The files that a configuration is made of: a YAML file behind its bases, and where each value stands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config.yaml_source import KeyPath, YamlSource, read_yaml
from megatron_laser.errors import ConfigError

BASE = "base"
"""The key at the top of a file that names one or several others."""


class Origin(str):
    """Where a value was given, as an error begins with it: "line 7: ", "override 'run.steps=2': ".

    place: the same beside a value: "examples/tiny_sum/laser.yaml:7", "override".
    """

    place: str

    def __new__(cls, prefix: str, place: str) -> Origin:
        made = super().__new__(cls, prefix)
        made.place = place
        return made


@dataclass(frozen=True, slots=True)
class Layer:
    """One file's settings, without `base`. main: the file that the user named, whose errors need no file's name."""

    source: YamlSource
    path: Path
    main: bool

    def origin(self, key: KeyPath) -> Origin | None:
        """Where `key` stands; None where that is not known."""
        line = self.source.lines.get(key)
        if line is None:
            return None
        variables = " ".join(f"${{{name}}}" for name in self.source.variables.get(key, ()))
        place = f"{self.path}:{line}"
        prefix = f"line {line}: " if self.main else f"{self.path}, line {line}: "
        return Origin(prefix, f"{place} with {variables}" if variables else place)

    def origins(self) -> dict[KeyPath, Origin]:
        """All that is known."""
        found = {key: self.origin(key) for key in self.source.lines}
        return {key: origin for key, origin in found.items() if origin is not None}

    def problems(self) -> list[str]:
        """What did not prevent reading on."""
        return [problem if self.main else f"{self.path}, {problem}" for problem in self.source.problems]


def read_layers(path: Path, *, main: bool = True) -> list[Layer]:
    """`path` and its bases, those whose values count less first.

    Args:
        main: whether `path` is the file that errors are about when they name none.

    Raises:
        ConfigError: a file that cannot be read, a base that is none, or bases that go in a circle.
    """
    return _read(path, (), main, set())


def _read(path: Path, above: tuple[Path, ...], main: bool, known: set[Path]) -> list[Layer]:
    """`known`: files that were read before. The base of two bases is read once, in front of both: behind the first of
    them it would set back what that one says."""
    source = read_yaml(path)
    layers: list[Layer] = []
    where = f"line {source.lines.get((BASE,), 1)}: {BASE}: "
    chain = (*above, path)
    known.add(path.resolve())
    own: set[Path] = set()  # what the bases before are made of
    for name in _names(source.data.pop(BASE, ()), where, path):
        base = Path(os.path.normpath(path.parent / os.path.expanduser(name)))
        if any(base.resolve() == one.resolve() for one in chain):
            circle = " -> ".join(map(str, (*chain, base)))
            raise ConfigError([f"{where}goes in a circle, {circle}; leave one of them out"], str(path))
        if not base.is_file():
            raise ConfigError([f"{where}no such file: {base} (from {name!r} in {path.parent}/)"], str(path))
        if base.resolve() in own:
            raise ConfigError(
                [
                    f"{where}{name!r} is among the bases before it, or a base of one of them; name it once, in front"
                ],
                str(path),
            )
        if base.resolve() in known:
            continue
        before = set(known)
        layers += _read(base, chain, False, known)
        own |= known - before
    return [*layers, Layer(source, path, main)]


def _names(value: Any, where: str, path: Path) -> Sequence[str]:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and all(isinstance(name, str) and name.strip() for name in names):
        return names
    raise ConfigError([f"{where}expected a YAML file or a list of them, got {value!r}"], str(path))
