"""The transformers model that generates in this process: loaded and checked, its cache, and what its routers choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

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


def random_model(folder: str | Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of the folder's config.json with random weights; no weight file is read."""
    settings = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache of keys and values for a model that generates a token at a time."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [batch, kv_heads, tokens, head_dim], with room for further tokens behind them.

    Upstream's layer copies everything for each token that is added. Read in transformers 5.23.
    """

    ROOM = 64
    """Tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add [batch, kv_heads, new tokens, head_dim]; returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._behind("keys", key_states)
        self.values = self._behind("values", value_states)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See upstream. The memory of the rows before is free at once."""
        super().batch_repeat_interleave(repeats)
        self._whole.clear()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See upstream. The memory of the rows before is free at once."""
        super().batch_select_indices(indices)
        self._whole.clear()

    def _behind(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """`new` behind what is there: in its own memory where there is room, else copied to where there is."""
        have: torch.Tensor = getattr(self, name)
        batch, heads, count, size = new.shape
        first = have.shape[2] if have.numel() else 0
        # Rows that were chosen or repeated are in other memory, without room.
        whole = self._whole.get(name)
        if whole is None or whole.data_ptr() != have.data_ptr() or whole.shape[2] < first + count:
            whole = new.new_empty(batch, heads, first + count + self.ROOM, size)
            if first:
                whole[:, :, :first] = have
            self._whole[name] = whole
        whole[:, :, first : first + count] = new
        return whole[:, :, : first + count]


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
