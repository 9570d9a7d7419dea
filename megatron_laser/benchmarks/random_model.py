"""Models of random weights in every shape that Hugging Face configurations have, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_laser.config.model_folder.parameters import tensor_shapes
from megatron_laser.model.hf_config import architecture_of
from megatron_laser.model.hf_folder import write_hf_folder


def random_weights(
    config: PretrainedConfig,
    *,
    seed: int = 0,
    spread: float = 0.02,
    vector_spread: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each parameter: normal around 0, norms around 1; an output layer that is tied is left out.

    Args:
        spread: standard deviation of matrices.
        vector_spread: of norms and biases.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in _shapes(config):
        tensor = torch.empty(shape, dtype=dtype, device=device)
        deviation = vector_spread if len(shape) == 1 else spread
        yield name, tensor.normal_(1.0 if "norm" in name else 0.0, deviation, generator=generator)


def _shapes(config: PretrainedConfig) -> list[tuple[str, tuple[int, ...]]]:
    architecture = architecture_of(config)
    if architecture.moe is not None:  # transformers joins a layer's experts, which a folder has one by one
        return list(tensor_shapes(architecture).items())
    with torch.device("meta"):
        return [(name, tuple(one.shape)) for name, one in _model(config).named_parameters()]


def save_random_model(
    folder: Path, config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, **settings: Any
) -> None:
    """A Hugging Face folder with `config` and `random_weights(config, **settings)`, in place of what is there."""
    save_config(folder, config)
    weights = random_weights(config, dtype=dtype, **settings)
    write_hf_folder(weights, folder, source=folder, dtype=dtype, max_shard_bytes=2**30)


def save_config(folder: Path, config: PretrainedConfig) -> None:
    """The config.json alone, which names the class of the model as beside weights."""
    with torch.device("meta"):
        config.architectures = [type(_model(config)).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)


def _model(config: PretrainedConfig) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model
