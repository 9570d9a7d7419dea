"""The root of a run's configuration: one section per concern, all keys known, everything frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from megatron_laser.config.schema.alarms import AlarmSettings
from megatron_laser.config.schema.fields import Section
from megatron_laser.config.schema.inputs import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RewardConfig,
)
from megatron_laser.config.schema.rollout import RolloutConfig
from megatron_laser.config.schema.system import (
    BatchingConfig,
    CheckpointConfig,
    LoggingConfig,
    ParallelConfig,
    RunSettings,
)
from megatron_laser.config.schema.training import LaserConfig, MoeConfig, OptimizerConfig, PolicyConfig


class RunConfig(Section):
    """One run, as one YAML file. Build it with `load_config`, which also runs the cross-field checks."""

    model: ModelConfig
    """The policy's starting point."""
    data: DataConfig
    """Problems and prompts."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Sampling of responses."""
    reward: RewardConfig = Field(default_factory=RewardConfig)
    """The verifier."""
    laser: LaserConfig = Field(default_factory=LaserConfig)
    """Last-token self-rewarding."""
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    """Policy loss."""
    moe: MoeConfig = Field(default_factory=MoeConfig)
    """Routers of a model with experts."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW and schedule."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Parallel layout."""
    batching: BatchingConfig = Field(default_factory=BatchingConfig)
    """Micro-batches."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """What is kept of the model."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Evaluation during and after the run."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """Metrics and logs."""
    alarms: AlarmSettings = Field(default_factory=AlarmSettings)
    """When the run says that something is wrong."""
    run: RunSettings
    """The run itself."""


def key_paths() -> dict[str, tuple[str, ...]]:
    """Section name -> names of its keys, in schema order; a nested section's keys are `name.key`."""
    return {name: tuple(_keys(field.annotation)) for name, field in RunConfig.model_fields.items()}


def nested_sections() -> dict[tuple[str, ...], type[Section]]:
    """(section, key) -> the section that this key holds."""
    return {
        (name, key): field.annotation
        for name, section in RunConfig.model_fields.items()
        for key, field in section.annotation.model_fields.items()  # type: ignore[union-attr]
        if _is_section(field.annotation)
    }


def _keys(section: Any) -> Iterator[str]:
    for key, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from (f"{key}.{inner}" for inner in _keys(field.annotation))
        else:
            yield key


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
