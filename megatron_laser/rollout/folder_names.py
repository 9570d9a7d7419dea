"""A transformers model's tensors under the names of its folder."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from megatron_laser.config.model_folder.parameters import expert_names

_LAYER_EXPERTS = re.compile(
    r"(model\.layers\.\d+\.)mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)"
)


def folder_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Views of all parameters by the names that exports and weight streams have.

    transformers 5 joins the experts of a layer when it loads a folder, which has each expert's matrices one by one.
    """
    names = expert_names(model.config.model_type)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        match = _LAYER_EXPERTS.fullmatch(name)
        if match is None:
            found[name] = parameter
            continue
        layer, kind = match.groups()
        if kind == "gate.weight":
            found[layer + names.router] = parameter
            continue
        for expert, matrix in enumerate(parameter):
            prefix = layer + names.expert.format(e=expert)
            if kind == "experts.down_proj":
                found[f"{prefix}.{names.down}.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                found |= {f"{prefix}.{names.gate}.weight": gate, f"{prefix}.{names.up}.weight": up}
    return found
