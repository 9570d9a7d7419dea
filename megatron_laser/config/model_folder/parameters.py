"""Exact parameter counts of an architecture, whole and per rank, and the bytes that training holds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from megatron_laser.config.model_folder.architecture import Architecture

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel dimensions; `data` is what the others leave of the world.

    Experts lie on the same ranks in another order: `expert` x `expert_tensor` x `expert_data` of each stage.
    stage_layers: layers on each pipeline stage, in all its chunks; () where each has as many.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int = 1
    stage_layers: tuple[int, ...] = ()

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers on each pipeline stage of a model of so many."""
        return self.stage_layers or (num_layers // self.pipeline,) * self.pipeline

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts: of a stage's ranks those that neither `expert` dimension tells apart."""
        return self.tensor * self.context * self.data // (self.expert * self.expert_tensor)

    @property
    def world_size(self) -> int:
        """Ranks in all; virtual stages share a rank."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True, slots=True)
class RankBytes:
    """Bytes that the biggest pipeline stage holds on each rank, without activations."""

    weights: int
    gradients: int
    optimizer: int
    reference_model: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.reference_model


def padded_vocab_size(vocab_size: int, tensor: int, multiple: int) -> int:
    """Rows of the padded vocabulary: each of `tensor` shards is a multiple of `multiple`."""
    unit = tensor * multiple
    return -(-vocab_size // unit) * unit


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model's Hugging Face folder, by name, in the order of an export; no padding.

    `lm_head.weight` is one of them only where embeddings are not tied.
    """
    return dict(_tensor_shapes(architecture))


@functools.cache
def _tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    table = (arch.vocab_size, arch.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table}
    layer = _layer_shapes(arch)
    for number in range(arch.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (arch.hidden_size,)
    if not arch.tied_embeddings:
        shapes[HEAD] = table
    return shapes


def _layer_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    hidden, ffn = arch.hidden_size, arch.intermediate_size
    query, key = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, rows in (("q", query), ("k", key), ("v", key)):
        shapes[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if arch.qkv_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    if arch.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (arch.head_dim,) for name in "qk"}
    shapes |= {
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
    }
    if arch.moe is None:
        return shapes | {
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }
    names, one = expert_names(arch.model_type), arch.moe.intermediate_size
    shapes[names.router] = (arch.moe.num_experts, hidden)
    for expert in range(arch.moe.num_experts):
        prefix = names.expert.format(e=expert)
        shapes |= {f"{prefix}.{name}.weight": (one, hidden) for name in (names.gate, names.up)}
        shapes[f"{prefix}.{names.down}.weight"] = (hidden, one)
    return shapes


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family calls its experts in a Hugging Face folder, below a layer; `{e}` stands for the expert."""

    router: str
    expert: str
    gate: str
    up: str
    down: str


def expert_names(model_type: str) -> ExpertNames:
    """The names in folders as they are published; transformers 5 joins a layer's experts when it loads one."""
    if model_type == "mixtral":
        return ExpertNames("block_sparse_moe.gate.weight", "block_sparse_moe.experts.{e}", "w1", "w3", "w2")
    return ExpertNames("mlp.gate.weight", "mlp.experts.{e}", "gate_proj", "up_proj", "down_proj")


@functools.cache  # thousands of names with experts, and asked for each layout that is tried
def count_parameters(architecture: Architecture) -> int:
    """Parameters of the whole model as transformers counts them: no padding, tied embeddings once."""
    return sum(math.prod(shape) for shape in _tensor_shapes(architecture).values())


def stage_parameters(architecture: Architecture, layout: Layout, vocab_multiple: int) -> tuple[int, ...]:
    """Parameters on each rank of every pipeline stage, padded vocabulary included.

    Weight matrices and their biases are split over `tensor`, experts over `expert` and `expert_tensor`; norms and
    routers are on every rank. The first stage holds the embedding, the last one the final norm and the head; tied
    weights are held by both where these are two stages. Virtual stages move layers between ranks but keep their number.
    """
    arch = architecture
    split, replicated, _ = _layer(arch)
    shard = padded_vocab_size(arch.vocab_size, layout.tensor, vocab_multiple) // layout.tensor
    table = shard * arch.hidden_size
    experts = stage_expert_parameters(arch, layout)
    stages = [
        layers * (split // layout.tensor + replicated) + own
        for layers, own in zip(layout.layers(arch.num_layers), experts, strict=True)
    ]
    stages[0] += table
    stages[-1] += arch.hidden_size
    if layout.pipeline > 1 or not arch.tied_embeddings:
        stages[-1] += table
    return tuple(stages)


def stage_expert_parameters(architecture: Architecture, layout: Layout) -> tuple[int, ...]:
    """Of `stage_parameters`, those of experts; 0 for a dense model."""
    _, _, experts = _layer(architecture)
    return tuple(
        layers * experts // (layout.expert * layout.expert_tensor)
        for layers in layout.layers(architecture.num_layers)
    )


def stage_matrices(architecture: Architecture, layout: Layout) -> tuple[int, ...]:
    """Of `stage_parameters`, those of the layers' weight matrices (and their biases): what FP8 products read."""
    split, _, _ = _layer(architecture)
    experts = stage_expert_parameters(architecture, layout)
    stages = zip(layout.layers(architecture.num_layers), experts, strict=True)
    return tuple(layers * split // layout.tensor + own for layers, own in stages)


def rank_bytes(
    parameters: int,
    dtype: str,
    *,
    shards: int,
    reference_model: bool,
    expert_parameters: int = 0,
    expert_shards: int = 1,
    gradient_dtype: str = "float32",
    moments_dtype: str = "float32",
) -> RankBytes:
    """Bytes for `parameters` on one rank.

    Args:
        parameters: held by the rank.
        dtype: float32 or bfloat16, of the weights. AdamW keeps two moments in `moments_dtype`, with bfloat16 weights
            also a float32 copy of them.
        shards: ranks that share the optimizer state: data-parallel x context-parallel size with the
            distributed optimizer, otherwise 1.
        reference_model: whether a frozen copy of the weights is held too.
        expert_parameters: of `parameters`, those of experts, whose optimizer state `expert_shards` ranks share.
        gradient_dtype: in which gradients are accumulated.
    """
    weights = parameters * DTYPE_BYTES[dtype]
    each = 2 * DTYPE_BYTES[moments_dtype] + (0 if dtype == "float32" else 4)
    dense = parameters - expert_parameters
    return RankBytes(
        weights=weights,
        gradients=parameters * DTYPE_BYTES[gradient_dtype],
        optimizer=-(-each * dense // shards) - (-each * expert_parameters // expert_shards),
        reference_model=weights if reference_model else 0,
    )


@functools.cache
def _layer(arch: Architecture) -> tuple[int, int, int]:
    """Parameters of one layer: (those that tensor parallelism splits, those on every rank, those of all experts)."""
    sizes = {name: math.prod(shape) for name, shape in _layer_shapes(arch).items()}
    router = expert_names(arch.model_type).router
    replicated = sum(size for name, size in sizes.items() if "norm" in name or name == router)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return sum(sizes.values()) - replicated - experts, replicated, experts
