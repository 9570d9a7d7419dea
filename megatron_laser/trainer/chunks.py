"""The parts of a model that lie on this rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megatron_laser.model.mapping import Geometry
from megatron_laser.model.policy_model import PolicyModel


@dataclass
class Chunks:
    """Model chunks of this rank, one per virtual pipeline stage.

    models: the bare `PolicyModel`s; wrapped: what the schedules call (bf16 and, when trained, DDP around).
    """

    models: list[PolicyModel]
    wrapped: list[torch.nn.Module]
    config: TransformerConfig
    hf: PretrainedConfig
    geometry: Geometry
