"""`run.epochs` made into `run.steps`: by the usable problems, and before these are known by the rows of the files."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

from megatron_laser.config.checks.settings import check_settings
from megatron_laser.config.derived import data_sources
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.data.readers import import_pyarrow, read_records
from megatron_laser.errors import DataError


def steps_for(epochs: float, problems: int, prompts_per_step: int) -> int:
    """Steps of `prompts_per_step` problems each in which all are taken `epochs` times; the last may take a few more."""
    # As it is written: 0.1 is a tenth, not the binary fraction next to it.
    return max(1, math.ceil(Fraction(str(epochs)) * problems / prompts_per_step))


def with_steps(config: RunConfig, problems: int) -> RunConfig:
    """`config` with `run.steps` in place of `run.epochs`, checked again; `config` itself where it has no epochs.

    Args:
        problems: usable training problems, of all sources.

    Raises:
        ConfigError: the steps do not go with another setting.
    """
    if config.run.steps_known:
        return config
    resolved = _with(config, steps=_steps(config, problems), epochs=None)
    check_settings(resolved)
    return resolved


def with_most_steps(config: RunConfig) -> RunConfig:
    """`config` with as many `run.steps` as it has at most, by the rows of its files: some of them may be unusable.

    `run.epochs` stay, since they are not settled. Where the files cannot be read, which others will say, one step.
    """
    if config.run.steps_known:
        return config
    try:
        rows = sum(count_rows(path) for source in data_sources(config, "train") for path in source.paths)
    except DataError:
        rows = 1
    return _with(config, steps=_steps(config, rows))


def epoch_words(config: RunConfig, steps: int) -> str:
    """How `run.epochs` of `config` came to `steps`, or "" where it has none."""
    run = config.run
    if run.steps_known:
        return ""
    many = f"{steps} step{'' if steps == 1 else 's'}"
    return f"run.epochs {run.epochs:g} at {config.rollout.prompts_per_step} problems a step: {many}"


def count_rows(path: Path) -> int:
    """Rows of a data file that `read_rows` would read; of a JSON Lines file its lines, unread.

    Raises:
        DataError: it is missing or unreadable, or no file of a known kind.
    """
    read_records(path)  # for what it says of the path; nothing is read before the first record is asked for
    try:
        if path.suffix.lower() == ".parquet":
            return int(import_pyarrow(path).parquet.ParquetFile(path).metadata.num_rows)
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _steps(config: RunConfig, problems: int) -> int:
    epochs = config.run.epochs
    assert epochs is not None
    # A smoke run (`rollout.limit`) has its few steps already.
    return min(config.run.steps, steps_for(epochs, problems, config.rollout.prompts_per_step))


def _with(config: RunConfig, **values: object) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update=values)})
