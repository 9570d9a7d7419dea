"""Which model a checkpoint is of: stored in its state, compared when it is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_laser.model.hf_config import architecture_of
from megatron_laser.model.mapping import Geometry


def model_identity(hf: PretrainedConfig, geometry: Geometry, dtype: torch.dtype) -> dict[str, Any]:
    """The sizes that tell models apart, whatever the parallel layout; plain JSON values."""
    moe = architecture_of(hf).moe
    return {
        "model_type": hf.model_type,
        "num_layers": geometry.num_layers,
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.ffn,
        "heads": geometry.heads,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "vocab_size": geometry.vocab,
        "tied": bool(hf.tie_word_embeddings),
        "dtype": str(dtype).removeprefix("torch."),
        **({f"experts.{name}": value for name, value in asdict(moe).items()} if moe else {}),
    }


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What differs, in words; "" when nothing does."""
    keys = [key for key in ours if theirs.get(key) != ours[key]]
    return ", ".join(
        f"{key} {json.dumps(theirs.get(key))} there, {json.dumps(ours[key])} here" for key in keys
    )
