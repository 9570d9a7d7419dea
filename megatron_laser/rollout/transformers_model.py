"""A model folder as transformers' module, for the in-process engine."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_laser.config import ModelFolderError, check_model_folder
from megatron_laser.finite import is_finite


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
