"""Whether a setting that names files names the same ones elsewhere: model, data, batches and functions that were moved.

Compared by content. Of a model's weights that is the size and samples of each file, since all of a large model would
take minutes; everything else is read whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_laser.config import RunConfig
from megatron_laser.config.derived import data_sources
from megatron_laser.config.schema.sources import DataSource, data_files, listed_sources
from megatron_laser.data import fingerprint
from megatron_laser.errors import DataError

FUNCTIONS = ("reward.function", "rollout.function", "policy.loss", "policy.advantage")
_WEIGHTS = (".safetensors", ".bin")
_MODEL_FILES = (*_WEIGHTS, ".json", ".jinja", ".txt", ".model", ".tiktoken")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def contents(config: RunConfig, data_fingerprints: Sequence[str] = ()) -> dict[str, str]:
    """Digests of what the settings name that hold paths, by setting; what is not there, or no file, is left out.

    Args:
        data_fingerprints: of the sources of `data.train`, where they are known.
    """
    found = {}
    for key in ("model.path", "data.train", "run.batches", *FUNCTIONS):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        known = "+".join(data_fingerprints) if key == "data.train" else ""
        digest = known or _digest(config, key, value)
        if digest is not None:
            found[key] = digest
    return found


def same_elsewhere(config: RunConfig, key: str, there: Any, recorded: Mapping[str, str]) -> bool:
    """Whether setting `key` of `config` names what another run's value of it, `there`, named: only the place differs.

    Args:
        there: as JSON. recorded: that run's `contents`.
    """
    section, _, name = key.partition(".")
    if key not in ("model.path", "data.train", "run.batches", *FUNCTIONS) or there is None:
        return False
    here = getattr(getattr(config, section), name)
    if key == "data.train" and _shares(here) != _shares(_sources(there)):
        return False
    if key in FUNCTIONS and _name(here) != _name(there):
        return False
    ours = _digest(config, key, here)
    theirs = recorded.get(key)
    if theirs is None and key != "data.train":
        theirs = _digest(config, key, there)
    if theirs is None and key == "data.train":
        theirs = _data(config, [data_files((source,)) for source in _sources(there)])
    return ours is not None and ours == theirs


def _digest(config: RunConfig, key: str, value: Any) -> str | None:
    """None where there is nothing to read."""
    if value is None:
        return None
    try:
        if key == "data.train":
            return _data(config, [source.paths for source in data_sources(config, "train")])
        if key in FUNCTIONS:
            file = value.rpartition(":")[0]
            return _hash([Path(file).read_bytes()]) if file.endswith(".py") else None
        parts = list(_model(Path(value)) if key == "model.path" else _batches(Path(value)))
        return _hash(parts) if parts else None
    except OSError:
        return None


def _data(config: RunConfig, sources: Sequence[Sequence[Path]]) -> str | None:
    keys = [config.data.prompt_key, config.data.answer_key]
    try:
        return "+".join(fingerprint(tuple(paths), keys) for paths in sources)
    except DataError:
        return None


def _sources(setting: Any) -> tuple[Any, ...]:
    """`data.train` as JSON, as the schema has it."""
    items = setting if isinstance(setting, list) else [setting]
    if any(isinstance(item, dict) for item in items):
        return tuple(DataSource.model_validate(item) for item in items)
    return (DataSource(path=tuple(Path(item) for item in items)),)


def _shares(setting: Any) -> list[tuple[Any, ...]]:
    """What a mixture says beside its files; nothing of one source without a reward of its own."""
    listed = listed_sources(setting)
    if len(listed) < 2:
        return [(source.reward,) for source in listed if source.reward]
    return [(source.label, source.weight or 1.0, source.reward) for source in listed]


def _name(function: Any) -> str:
    return str(function).rpartition(":")[2]


def _model(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in _MODEL_FILES:
            continue
        size = path.stat().st_size
        yield f"{path.name} {size}".encode()
        with path.open("rb") as file:
            if path.suffix not in _WEIGHTS or size <= _SAMPLES * _SAMPLE_BYTES:
                yield file.read()
                continue
            for number in range(_SAMPLES):
                file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                yield file.read(_SAMPLE_BYTES)


def _batches(folder: Path) -> Iterator[bytes]:
    """Names and sizes of all batches, and what is said of each."""
    for path in sorted(folder.glob("step_*")):
        yield f"{path.name} {path.stat().st_size}".encode()
        if path.suffix == ".json":
            yield path.read_bytes()


def _hash(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256(json.dumps([len(part) for part in parts]).encode())
    for part in parts:
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"
