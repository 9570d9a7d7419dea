"""Run configurations for tests: small, fp32, written to a file and read back like a user's."""

from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_laser.config import load_config
from megatron_laser.config.schema.root import RunConfig

SCORE_TOKEN = 249


def run_config(folder: Path, model: Path, *overrides: str, **sections: dict[str, Any]) -> RunConfig:
    """A loaded configuration; `sections` are merged over the defaults below, `overrides` come last."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "dtype": "float32", "vocab_multiple": 16},
        "data": {"train": str(folder / "unused.jsonl"), "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 64},
        "laser": {"score_token": SCORE_TOKEN, "ref_logprob": -6.0, "beta": 0.4},
        "run": {"steps": 3, "output_dir": str(folder / "run"), "deadline": 60},
    }
    for section, values in sections.items():
        defaults.setdefault(section, {}).update(values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(defaults))
    return load_config(path, overrides)


def torch_optimizers(trainer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's."""
    optimizer = trainer.policy.optimizer
    return [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]


def state_of(trainer: Any) -> list[torch.Tensor]:
    """Every number that training goes on from: weights, main weights, Adam's moments and step counts."""
    tensors = [parameter for model in trainer.policy.chunks.models for parameter in model.parameters()]
    for optimizer in torch_optimizers(trainer):
        tensors += [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for values in optimizer.state.values():
            tensors += [values[name] for name in sorted(values) if isinstance(values[name], torch.Tensor)]
    return tensors
