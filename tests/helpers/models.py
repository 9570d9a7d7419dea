"""Tiny random models of every supported family, saved as Hugging Face folders."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_laser.benchmarks.random_model import random_weights

VOCAB_SIZE = 250
_SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
# Low and high frequency bounds inside the tiny context, so that the scaling changes some frequencies only.
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
_EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16)
FAMILIES = {
    "qwen2": (Qwen2Config, dict(tie_word_embeddings=False)),
    "qwen2-tied": (Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, dict(tie_word_embeddings=True, head_dim=32)),
    "qwen3-untied": (Qwen3Config, dict(tie_word_embeddings=False, head_dim=32)),
    "qwen3-moe": (Qwen3MoeConfig, dict(tie_word_embeddings=False, norm_topk_prob=True, **_EXPERTS)),
    "qwen3-moe-unnormalised": (
        Qwen3MoeConfig,
        dict(tie_word_embeddings=True, norm_topk_prob=False, **_EXPERTS),
    ),
    "mixtral": (
        MixtralConfig,
        dict(tie_word_embeddings=False, num_local_experts=8, num_experts_per_tok=2, intermediate_size=24),
    ),
    "llama3-rope": (LlamaConfig, dict(tie_word_embeddings=False, rope_parameters=_LLAMA3_ROPE)),
}
# Of one of them, with sizes that FP8 products take: multiples of 16.
OTHER_SIZES = {
    "qwen3-moe-even": (
        Qwen3MoeConfig,
        dict(tie_word_embeddings=False, norm_topk_prob=True, **_EXPERTS | {"moe_intermediate_size": 32}),
    ),
}


def tiny_config(family: str, **changes: object) -> PretrainedConfig:
    """The configuration of a tiny model of `family`, a key of FAMILIES or OTHER_SIZES."""
    config_class, settings = (FAMILIES | OTHER_SIZES)[family]
    return config_class(**(_SIZES | settings | changes))


def tiny_model(
    family: str, *, seed: int = 0, scale: float = 0.08, vector_scale: float = 0.2, **changes: object
) -> PreTrainedModel:
    """An fp32 model whose every parameter is random: norms differ from 1 and biases from 0."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    weights = random_weights(model.config, seed=seed, spread=scale, vector_spread=vector_scale)
    own = disk_tensors(model)
    for name, tensor in weights:  # a tied output layer is not among them
        own[name].data.copy_(tensor)
    return model.eval()


def disk_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors (views) under the names of its folder, which has an expert's matrices one by one."""
    if not hasattr(model.config, "num_experts_per_tok"):
        return model.state_dict()
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        head, _, last = name.rpartition(".")
        if mixtral:
            head = head.replace(".mlp", ".block_sparse_moe")
        if last == "gate_up_proj":
            for expert, both in enumerate(tensor):
                found |= {
                    f"{head}.{expert}.{part}.weight": half for part, half in zip((gate, up), both.chunk(2))
                }
        elif last == "down_proj":
            found |= {f"{head}.{expert}.{down}.weight": one for expert, one in enumerate(tensor)}
        else:
            found[f"{head}.{last}"] = tensor
    return found


def save_tiny_model(
    folder: Path, family: str, *, max_shard_size: str = "1GB", **changes: object
) -> PreTrainedModel:
    """`tiny_model`, written to `folder` by transformers itself."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def save_word_tokenizer(folder: Path, words: list[str]) -> None:
    """A tokenizer whose tokens are `words`, split at spaces.

    <unk>, <eos> and, where it is there, <pad> are what they say; <|...|> are special.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>" if "<pad>" in words else None,
        extra_special_tokens=[word for word in words if word.startswith("<|")],
    )
    fast.save_pretrained(folder)


def chosen_experts(model, ids: Sequence[int]) -> torch.Tensor:
    """[tokens, layers, experts per token] int64 of a transformers model's own routers, in one forward."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, result: found.append(result[2]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, dim=1)
