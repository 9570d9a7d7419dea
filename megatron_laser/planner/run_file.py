"""What is planned: a run's YAML, or a Hugging Face config.json with a default LaSeR run around it; and back to YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config.loading import config_of, load_config, resolved_yaml
from megatron_laser.config.model_folder.architecture import read_architecture
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.yaml_text import one_line, yaml_text
from megatron_laser.errors import ConfigError

NAME = "config.json"
PLACEHOLDER = "problems.jsonl"
"""`data.train` of a run that stands around a bare config.json."""
C_REF = -23.0
"""c_ref of Qwen2.5 in the paper: no phase's time or memory depends on it."""

Settings = Mapping[str, Any]
"""Settings by dotted name, `parallel.tensor` or `rollout.sglang.tensor`."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """The configuration, and for a bare model what stands around it, in words ("" for a run's own YAML)."""

    config: RunConfig
    default_of: str

    @property
    def is_default(self) -> bool:
        """Whether nobody has chosen this layout, and so none is shown as configured."""
        return bool(self.default_of)


def read_run(path: Path, overrides: Sequence[str] = (), set_files: Sequence[Path] = ()) -> PlannedRun:
    """The run that `path` names.

    Args:
        path: a run's YAML file; or a Hugging Face folder, or its config.json, around which stands a default run.
        overrides: "section.key=value" each.
        set_files: YAML files of further settings; for a run's YAML only.

    Raises:
        ConfigError: no such file, no such model, or settings that do not go together.
    """
    if path.is_dir() and not (path / NAME).is_file():
        raise ConfigError(
            [f"the folder has no {NAME}; expected a Hugging Face folder or a run's YAML"], str(path)
        )
    folder = path if path.is_dir() else path.parent if path.name == NAME else None
    if folder is None:
        if path.suffix == ".json":
            problem = f"expected a run's YAML, a Hugging Face folder or its {NAME}, got another JSON file"
            raise ConfigError([problem], str(path))
        return PlannedRun(load_config(path, overrides, set_files), "")
    if set_files:
        raise ConfigError(["--set-file goes with a run's YAML, and this is a model"], str(path))
    architecture = read_architecture(folder)
    # As the paper has them, or what a model with fewer positions can hold.
    prompt = min(2048, architecture.max_position_embeddings // 5)
    response = min(8192, architecture.max_position_embeddings - prompt)
    experts = {"moe": {"routing_replay": True}, "policy": {"importance_cap": 2.0}} if architecture.moe else {}
    settings: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"train": PLACEHOLDER, "max_prompt_tokens": prompt},
        "rollout": {
            "engine": "sglang",
            "max_new_tokens": response,
            "sglang": {"options": {"mem_fraction_static": 0.85}},
        },
        # An id that no stop token has: which token it is changes no time.
        "laser": {"score_token": architecture.vocab_size - 1, "ref_logprob": C_REF},
        "optimizer": {"distributed": True},
        "run": {"steps": 1600, "output_dir": f"runs/{folder.resolve().name}"},
        **experts,
    }
    config = config_of(settings, overrides, str(path))
    rollout = config.rollout
    return PlannedRun(
        config,
        f"a default LaSeR run around {folder / NAME}: the paper's batch (arXiv 2510.14943), "
        f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples a step, prompts of up to "
        f"{config.data.max_prompt_tokens:,} and responses of up to {rollout.max_new_tokens:,} tokens, one optimizer "
        "step; laser.score_token, laser.ref_logprob and data.train stand for yours (`megatron-laser calibrate` "
        "measures the first two)",
    )


def changed(config: RunConfig, settings: Settings) -> RunConfig:
    """`config` with `settings`, unchecked: `resolve_plan` and `another_layout` check it."""
    sections: dict[str, dict[str, Any]] = {}
    servers: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if section == "rollout" and key.startswith("sglang."):
            servers[key.removeprefix("sglang.")] = value
        else:
            sections.setdefault(section, {})[key] = value
    if servers:
        sections.setdefault("rollout", {})["sglang"] = config.rollout.sglang.model_copy(update=servers)
    return config.model_copy(
        update={
            section: getattr(config, section).model_copy(update=values)
            for section, values in sections.items()
        }
    )


def differences(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """Settings of `after` that differ from `before`, as YAML would have them, by dotted name."""
    old, new = (_flat(config.model_dump(mode="json")) for config in (before, after))
    return {name: value for name, value in new.items() if old.get(name) != value}


def _flat(dumped: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in dumped.items():
        for key, value in values.items():
            if (section, key) == ("rollout", "sglang"):
                flat |= {f"rollout.sglang.{inner}": item for inner, item in value.items()}
            else:
                flat[f"{section}.{key}"] = value
    return flat


def as_yaml(settings: Settings) -> str:
    """Settings by dotted name as sections to paste into a run's YAML."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, key = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return yaml_text(nested, width=80) if nested else ""


def as_overrides(settings: Settings) -> list[str]:
    """The same as `section.key=value` for a command line, unquoted."""
    return [f"{name}={one_line(value)}" for name, value in settings.items()]


def whole_run(config: RunConfig, head: Sequence[str]) -> str:
    """The whole run as a YAML file that `train` takes; `head`: lines of comment above it."""
    return "".join(f"# {line}\n" for line in head) + resolved_yaml(config)
