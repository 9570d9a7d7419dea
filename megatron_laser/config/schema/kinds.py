"""Settings by what it means to continue a run with another value of them; the marks stand at the fields.

Names of settings are `section.key`, with keys of nested sections `section.name.key`, and of a readout
`laser.readouts[0].key`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_laser.config.schema.fields import Changing, Kind, Section
from megatron_laser.config.schema.readouts import ReadoutConfig
from megatron_laser.config.schema.root import RunConfig

_READOUT = re.compile(r"laser\.readouts\[\d+\]\.(\w+)")


def kind_of(setting: str) -> Kind:
    """`identity`, `learning` or `running`. Raises KeyError for a setting that there is not."""
    return changing(setting).kind


def changing(setting: str) -> Changing:
    """The mark of a setting: its own, or its section's. Raises KeyError for a setting that there is not."""
    if entry := _READOUT.fullmatch(setting):
        return mark_of(ReadoutConfig, entry[1])
    section: type[Section] = RunConfig
    default: Changing | None = None
    *parents, key = setting.partition("[")[0].split(".")
    for parent in parents:
        section = section.model_fields[parent].annotation  # type: ignore[assignment]
        default = getattr(section, "changing", default)  # a nested one may leave it to the section around it
    return mark_of(section, key, default)


def all_settings() -> Iterator[str]:
    """The name of each setting, nested ones too, in the schema's order."""
    yield from _names(RunConfig, "")


def _names(section: type[Section], prefix: str) -> Iterator[str]:
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _names(inner, f"{prefix}{key}.")
        else:
            yield prefix + key


def mark_of(section: type[Section], key: str, default: Changing | None = None) -> Changing:
    """The mark of a key of `section`, which may leave it to the section around it (`default`). Raises KeyError."""
    field: Any = section.model_fields[key]
    own = getattr(section, "changing", default)
    found = next((mark for mark in field.metadata if isinstance(mark, Changing)), own)
    if found is None:
        raise KeyError(
            f"{section.__name__} does not say what changing {key} means: see Changing in fields.py"
        )
    return found
