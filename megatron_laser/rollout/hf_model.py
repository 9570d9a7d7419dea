"""The transformers model that generates in this process: loaded and checked, and what its routers choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_laser.algorithms.numerics import is_finite
from megatron_laser.config import ModelFolderError, check_model_folder
from megatron_laser.types import RoutingShape


def load_model(folder: str | Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The folder's model in `dtype` on `device`, for inference.

    Raises:
        ConfigError, ModelFolderError: its weights are not those of its config.json, or are not all finite.
    """
    check_model_folder(folder)  # transformers loads what is there and makes up the rest
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, local_files_only=True, attn_implementation="sdpa"
    )
    for parameter in model.parameters():
        # A copy: the file is mapped, and whoever cuts it off would end the process.
        parameter.data = parameter.data.to(device, copy=True)
    if bad := [name for name, parameter in model.named_parameters() if not is_finite(parameter)]:
        raise ModelFolderError(
            f"{folder}: {len(bad)} tensors hold NaN or infinity ({', '.join(bad[:3])}); use weights from before that, "
            "or download the files again"
        )
    return model.to(device).eval().requires_grad_(False)


class RoutingRecorder:
    """Notes which experts a model's routers choose, until it is closed."""

    def __init__(self, model: PreTrainedModel, shape: RoutingShape) -> None:
        # One entry for every token of a whole batch is kept until its last row ends.
        self._dtype = torch.from_numpy(np.empty(0, dtype=shape.dtype)).dtype
        self._chosen: list[torch.Tensor] = []
        # A router's third result: transformers' Qwen3-MoE and Mixtral.
        self._hooks = [
            layer.mlp.gate.register_forward_hook(lambda _, __, result: self._chosen.append(result[2]))
            for layer in model.model.layers
        ]

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def take(self, rows: int, width: int) -> torch.Tensor:
        """The experts of the last forward over [rows, width] tokens: [rows, width, layers, k] on the CPU."""
        chosen = torch.stack([layer.cpu() for layer in self._chosen], dim=1).to(self._dtype)
        self._chosen.clear()
        return chosen.view(rows, width, *chosen.shape[1:])
