"""Which Hugging Face tensors make up which Megatron parameter, both ways, for one tensor-parallel shard.

A family is a table of `Rule`s keyed on *global* Megatron names (layer numbers count over all pipeline
stages, experts over all expert-parallel ranks). Transformer Engine modules fuse norms into the following linear layer
and hold a rank's experts in one module; `ALIASES` and `EXPERT_NAMES` bring their names back to the table's. Another
family is another table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from transformers import PretrainedConfig

from megatron_laser.config import padded_vocab_size
from megatron_laser.config.model_folder.parameters import EMBEDDING, HEAD, expert_names
from megatron_laser.model.hf_config import architecture_of, head_dim

OUTPUT_LAYER = "output_layer.weight"
ROUTER = "mlp.router.weight"  # below a layer
# Transformer Engine name -> the table's name.
ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# A rank's experts, one module each or grouped by Transformer Engine: (its number on the rank, the linear layer).
EXPERT_NAMES = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12])\.weight"),
    re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<expert>\d+)"),
)


class TensorReader(Protocol):
    """Reads parts of named tensors, so that a rank never holds more than its shard."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """tensor[start:stop]"""

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """tensor[:, start:stop]"""

    def full(self, name: str) -> torch.Tensor:
        """The whole tensor."""


@dataclass(frozen=True)
class Geometry:
    """The sizes that a mapping needs."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    padded_vocab: int
    tensor: int
    expert_ffn: int = 0
    expert_tensor: int = 1

    @classmethod
    def of(
        cls, config: PretrainedConfig, *, tensor: int, vocab_multiple: int, expert_tensor: int = 1
    ) -> Geometry:
        """From a Hugging Face configuration and tensor-parallel sizes: of the experts, and of everything else."""
        moe = architecture_of(config).moe
        return cls(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim(config),
            vocab=config.vocab_size,
            padded_vocab=padded_vocab_size(config.vocab_size, tensor, vocab_multiple),
            tensor=tensor,
            expert_ffn=moe.intermediate_size if moe else 0,
            expert_tensor=expert_tensor,
        )

    def of_expert(self) -> Geometry:
        """The sizes of one expert's layers, which have a tensor-parallel size of their own."""
        return replace(self, ffn=self.expert_ffn, tensor=self.expert_tensor)


class Layout(Protocol):
    """How one Megatron parameter is made of Hugging Face tensors."""

    def load(self, reader: TensorReader, names: Sequence[str], g: Geometry, rank: int) -> torch.Tensor:
        """The local shard of tensor-parallel rank `rank`."""

    def export(self, shards: Sequence[torch.Tensor], g: Geometry) -> list[torch.Tensor]:
        """The Hugging Face tensors, from the shards of all tensor-parallel ranks in order."""


class Replicated:
    """The same on every tensor-parallel rank: norms."""

    def load(self, reader: TensorReader, names: Sequence[str], g: Geometry, rank: int) -> torch.Tensor:
        return reader.full(names[0])

    def export(self, shards: Sequence[torch.Tensor], g: Geometry) -> list[torch.Tensor]:
        return [shards[0]]


class Row:
    """Input features are split: attention output and MLP down projections."""

    def __init__(self, features: str) -> None:
        self.features = features

    def load(self, reader: TensorReader, names: Sequence[str], g: Geometry, rank: int) -> torch.Tensor:
        size = (g.ffn if self.features == "ffn" else g.heads * g.head_dim) // g.tensor
        return reader.columns(names[0], rank * size, (rank + 1) * size)

    def export(self, shards: Sequence[torch.Tensor], g: Geometry) -> list[torch.Tensor]:
        return [torch.cat(list(shards), dim=1)]


class Vocabulary:
    """Rows are tokens, padded with zero rows behind the real vocabulary; padding is never exported."""

    def load(self, reader: TensorReader, names: Sequence[str], g: Geometry, rank: int) -> torch.Tensor:
        size = g.padded_vocab // g.tensor
        start, stop = min(rank * size, g.vocab), min((rank + 1) * size, g.vocab)
        real = reader.rows(names[0], start, stop)
        if len(real) == size:
            return real
        return torch.cat([real, real.new_zeros(size - len(real), g.hidden)])

    def export(self, shards: Sequence[torch.Tensor], g: Geometry) -> list[torch.Tensor]:
        return [torch.cat(list(shards))[: g.vocab]]


class GatedMlp:
    """Gate and up projection, one after the other inside every shard."""

    def load(self, reader: TensorReader, names: Sequence[str], g: Geometry, rank: int) -> torch.Tensor:
        size = g.ffn // g.tensor
        return torch.cat([reader.rows(name, rank * size, (rank + 1) * size) for name in names])

    def export(self, shards: Sequence[torch.Tensor], g: Geometry) -> list[torch.Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


class Qkv:
    """Query, key and value rows interleaved by query group: [q heads of the group, k, v] for each kv head."""

    def load(self, reader: TensorReader, names: Sequence[str], g: Geometry, rank: int) -> torch.Tensor:
        groups = g.kv_heads // g.tensor
        per_group = g.heads // g.kv_heads
        parts = []
        for name, width in zip(names, (per_group * g.head_dim, g.head_dim, g.head_dim), strict=True):
            part = reader.rows(name, rank * groups * width, (rank + 1) * groups * width)
            parts.append(part.reshape(groups, width, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def export(self, shards: Sequence[torch.Tensor], g: Geometry) -> list[torch.Tensor]:
        per_group = g.heads // g.kv_heads
        widths = [per_group * g.head_dim, g.head_dim, g.head_dim]
        whole = torch.cat(list(shards))
        grouped = whole.reshape(g.kv_heads, sum(widths), *whole.shape[1:])
        return [part.flatten(0, 1).contiguous() for part in grouped.split(widths, dim=1)]


@dataclass(frozen=True)
class Rule:
    """One line of a family's table; `{i}` stands for the global layer number and `{e}` for the expert, both from 0.

    expert: which one the parameter belongs to, from 0; None for those that every expert-parallel rank has.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    exported: bool = True
    expert: int | None = None

    def at(self, layer: int, expert: int | None = None) -> Rule:
        """The rule for one layer, and one expert of it."""
        return Rule(
            self.megatron.format(i=layer, e=expert),
            tuple(name.format(i=layer, e=expert) for name in self.hf),
            self.layout,
            self.exported,
            expert,
        )

    def geometry(self, whole: Geometry) -> Geometry:
        """The sizes that its layout needs."""
        return whole if self.expert is None else whole.of_expert()


_LAYER = "decoder.layers.{i}."
_EXPERT = _LAYER + "mlp.experts.{e}."
_HF_LAYER = "model.layers.{i}."


def _attention(kind: str) -> Rule:
    names = tuple(f"{_HF_LAYER}self_attn.{x}_proj.{kind}" for x in "qkv")
    return Rule(f"{_LAYER}self_attention.linear_qkv.{kind}", names, Qkv())


def _norm(megatron: str, hf: str) -> Rule:
    return Rule(_LAYER + megatron, (_HF_LAYER + hf,), Replicated())


_ATTENTION = (
    _norm("input_layernorm.weight", "input_layernorm.weight"),
    _attention("weight"),
    Rule(
        _LAYER + "self_attention.linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",), Row("heads")
    ),
    _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)
_DENSE = (
    *_ATTENTION,
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        GatedMlp(),
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), Row("ffn")),
)
_QK_NORM = (
    _norm("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _norm("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)


def _router(model_type: str) -> Rule:
    return Rule(_LAYER + ROUTER, (_HF_LAYER + expert_names(model_type).router,), Replicated())


LAYER_TABLES: dict[str, tuple[Rule, ...]] = {
    "llama": _DENSE,
    "qwen2": (*_DENSE, _attention("bias")),
    "qwen3": (*_DENSE, *_QK_NORM),
    "qwen3_moe": (*_ATTENTION, *_QK_NORM, _router("qwen3_moe")),
    "mixtral": (*_ATTENTION, _router("mixtral")),
}


def _expert_rules(model_type: str) -> tuple[Rule, ...]:
    """One expert's table."""
    names = expert_names(model_type)
    prefix = f"{_HF_LAYER}{names.expert}."
    return (
        Rule(
            _EXPERT + "linear_fc1.weight",
            (f"{prefix}{names.gate}.weight", f"{prefix}{names.up}.weight"),
            GatedMlp(),
        ),
        Rule(_EXPERT + "linear_fc2.weight", (f"{prefix}{names.down}.weight",), Row("ffn")),
    )


def rules(config: PretrainedConfig) -> list[Rule]:
    """All rules of a model in export order: embedding, layers, final norm, output layer."""
    embedding = (EMBEDDING,)
    tied = bool(config.tie_word_embeddings)
    moe = architecture_of(config).moe
    experts = _expert_rules(config.model_type) if moe else ()
    return [
        Rule("embedding.word_embeddings.weight", embedding, Vocabulary()),
        *(
            rule
            for layer in range(config.num_hidden_layers)
            for rule in (
                *(rule.at(layer) for rule in LAYER_TABLES[config.model_type]),
                *(rule.at(layer, e) for e in range(moe.num_experts if moe else 0) for rule in experts),
            )
        ),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
        # A tied last pipeline stage holds a copy of the embedding, which is loaded but not exported again.
        Rule(OUTPUT_LAYER, embedding if tied else (HEAD,), Vocabulary(), exported=not tied),
    ]


def global_names(chunks: Iterable[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank's (unwrapped) model chunks under the table's global names."""
    named: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        layers = chunk.decoder.layers
        for name, parameter in chunk.named_parameters():
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
            if match:
                layer = layers[int(match[1])]
                name = _LAYER.format(i=layer.layer_number - 1) + _in_layer(match[2], layer)
            named[name] = parameter
    return named


def _in_layer(name: str, layer: torch.nn.Module) -> str:
    """The table's name of a layer's parameter."""
    for pattern in EXPERT_NAMES:
        if match := pattern.fullmatch(name):
            # of all experts, those that this rank has
            expert = layer.mlp.local_expert_indices[int(match["expert"])]  # type: ignore[union-attr,index]
            return f"mlp.experts.{expert}.{match['linear']}.weight"
    return ALIASES.get(name, name)
