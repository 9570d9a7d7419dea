"""Data settings that take files, or several sources of problems with a share, a name and a verifier each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
)

from megatron_laser.config.schema.fields import (
    Count,
    FilePaths,
    NonNegative,
    OptionalFilePaths,
    Positive,
    RewardName,
    Section,
    identity,
)

SOURCE_SETTINGS = ("train", "validation", "test")
"""The keys of `data` that take sources."""

EVALUATION_KEYS = ("samples_per_prompt", "max_prompts", "temperature")
"""The keys of a source that only evaluations have."""

_NAME = re.compile(r"[\w.+-]+")
_NOT_IN_A_NAME = re.compile(r"[^\w.+-]+")


class DataSource(Section):
    """One of several sources."""

    changing = identity("the mixture of problems, in which a checkpoint keeps its place, would be another")

    path: FilePaths
    """One .jsonl or .parquet file, or a list of them."""
    weight: Positive | None = None
    """Of the prompts this source gives its weight over the sum of all weights; null: 1. Training only."""
    reward: RewardName | None = None
    """The verifier of this source; null: `reward.function`."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """In the names of metrics; null: the first file's name without its suffix."""
    samples_per_prompt: Count | None = None
    """Responses to each of its problems; null: `evaluation.samples_per_prompt`, for `data.test`
    `evaluation.final_samples_per_prompt`. Validation and test only, like the next two."""
    max_prompts: Count | None = None
    """Use only its first so many problems; null: `evaluation.max_prompts`."""
    temperature: NonNegative | None = None
    """Sampling temperature; null: `evaluation.temperature`."""

    @field_validator("name")
    @classmethod
    def _fits_a_metric(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("expected letters, digits, . _ + - (it becomes a part of metrics' names)")
        return value

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Training sources have none of these: the identity of a run is as before there were any."""
        found: dict[str, Any] = handler(self)
        return {key: value for key, value in found.items() if key not in EVALUATION_KEYS or value is not None}

    @property
    def label(self) -> str:
        """Its name, given or made of the file's."""
        return self.name or _NOT_IN_A_NAME.sub("_", self.path[0].stem)


def _kind(value: Any) -> str:
    items = value if isinstance(value, list | tuple) else [value]
    return "sources" if any(isinstance(item, dict | DataSource) for item in items) else "paths"


def _listed(value: Any) -> Any:
    items = (value,) if isinstance(value, dict) else tuple(value)
    if not all(isinstance(item, dict | DataSource) for item in items):
        raise ValueError("expected either files, or sources {path: FILE, ...} throughout")
    return items


_Listed = Annotated[tuple[DataSource, ...], BeforeValidator(_listed)]

Sources = Annotated[
    Annotated[FilePaths, Tag("paths")] | Annotated[_Listed, Tag("sources")], Discriminator(_kind)
]
OptionalSources = Annotated[
    Annotated[OptionalFilePaths, Tag("paths")] | Annotated[_Listed, Tag("sources")], Discriminator(_kind)
]
Setting = tuple[Path, ...] | tuple[DataSource, ...]
"""What such a setting holds, once it is read."""
TAGS = ("paths", "sources")
"""What pydantic puts into the place of an error, beside keys and indices."""


def listed_sources(setting: Setting | None) -> tuple[DataSource, ...]:
    """The sources of a setting that lists them, () for one that names files."""
    return tuple(item for item in setting or () if isinstance(item, DataSource))


def data_files(setting: Setting | None) -> tuple[Path, ...]:
    """All files of a setting, in order."""
    files: list[Path] = []
    for item in setting or ():
        files += item.path if isinstance(item, DataSource) else [item]
    return tuple(files)
