"""FLOPs by a model's shape, against what torch counts in transformers' forward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_laser.config.derived import pipeline_bubble
from megatron_laser.config.model_folder.architecture import Architecture, MixtureOfExperts
from megatron_laser.config.model_folder.flops import (
    attention_flops,
    flops_per_token,
    forward_flops,
    layer_flops_per_token,
    mlp_flops_per_token,
    recomputed_flops,
    training_flops,
)
from megatron_laser.config.schema.system import ParallelConfig
from megatron_laser.model.hf_config import architecture_of

_SIZES = dict(
    vocab_size=90,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
)
CONFIGS: dict[str, PretrainedConfig] = {
    "dense": Qwen2Config(**_SIZES, intermediate_size=48),
    "tied": LlamaConfig(**_SIZES, intermediate_size=40, tie_word_embeddings=True),
    "wide heads": Qwen3Config(**_SIZES, intermediate_size=48, head_dim=16),
    "experts": Qwen3MoeConfig(
        **_SIZES,
        intermediate_size=48,
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
    ),
    "all experts": MixtralConfig(**_SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=4),
}


def _counted(config: PretrainedConfig, length: int, *, backward: bool) -> int:
    """Products of transformers' model with all rows labelled, by torch's own counter."""
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        logits = model(torch.randint(0, 90, (1, length))).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def _unmasked(architecture: Architecture, length: int) -> int:
    """Of all layers, what transformers multiplies beyond ours: queries with keys that stand behind them, whose weight
    is 0."""
    future = length * (length - 1) // 2
    per_pair = 4 * architecture.num_attention_heads * architecture.head_dim
    return architecture.num_layers * per_pair * future


@pytest.mark.parametrize("length", [1, 7, 32])
@pytest.mark.parametrize("kind", CONFIGS)
def test_they_are_what_torch_counts_but_for_the_keys_that_a_mask_hides(kind, length):
    config = CONFIGS[kind]
    architecture = architecture_of(config)
    future = _unmasked(architecture, length)
    forward = forward_flops(architecture, length, length)
    assert _counted(config, length, backward=False) == forward + future
    trained = training_flops(architecture, length, length)
    assert _counted(config, length, backward=True) == trained + 3 * future


def test_a_dense_models_are_transformers_own_estimate_but_for_norms_and_attention():
    config = CONFIGS["wide heads"]
    model = AutoModelForCausalLM.from_config(config)
    tokens, architecture = 20, architecture_of(config)
    # 6 for each parameter and token, the embedding's left out: its trainer's figure (`floating_point_ops` before 5.0)
    estimate = 6 * tokens * model.num_parameters(exclude_embeddings=True)
    norms = sum(one.numel() for name, one in model.named_parameters() if "norm" in name)
    attention = 3 * 3 * attention_flops(architecture, tokens)
    assert training_flops(architecture, tokens, tokens) == estimate - 6 * tokens * norms + attention


# By hand: q 8 x 4, k and v 4 x 4, o 4 x 8 for 2 heads of 4 over hidden 4 with one key head: 96 elements.
_HAND = dict(
    model_type="qwen3",
    hidden_size=4,
    num_layers=5,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=10,
    vocab_size=7,
    tied_embeddings=False,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    qkv_bias=False,
    qk_norm=True,
    rope_theta=1e4,
    rope_type="default",
    rope_scaling=None,
)
DENSE = Architecture(**_HAND)
# A router of 6 x 4 and 2 of 6 experts of 3 x 4 x 3.
MIXTURE = Architecture(**_HAND | dict(model_type="qwen3_moe"), moe=MixtureOfExperts(6, 2, 3, True))


def test_a_step_and_its_recomputation_by_hand():
    assert (layer_flops_per_token(DENSE), mlp_flops_per_token(DENSE)) == (2 * (96 + 120), 2 * 120)
    assert (layer_flops_per_token(MIXTURE), mlp_flops_per_token(MIXTURE)) == (2 * (96 + 96), 2 * 96)
    # 3 tokens: 6 pairs of 2 products of 2 heads x 4, two operations each; 2 labelled rows of 4 x 7
    assert attention_flops(DENSE, 3) == 6 * 2 * 8 * 2 == 192
    assert training_flops(DENSE, 3, 2) == 3 * (5 * (3 * 432 + 192) + 2 * 2 * 28) == 22656
    assert recomputed_flops(DENSE, 3, "none") == 0
    assert recomputed_flops(DENSE, 3, "full") == 5 * (3 * 432 + 192)
    assert recomputed_flops(DENSE, 3, "full", layers=2, labelled=2) == 2 * (3 * 432 + 192) + 2 * 2 * 28
    assert recomputed_flops(DENSE, 3, ("mlp",)) == 5 * 3 * 240
    assert recomputed_flops(DENSE, 3, ("core_attn", "mlp")) == 5 * (3 * 240 + 192)
    assert recomputed_flops(MIXTURE, 3, ("layernorm", "moe_act")) == 0
    assert recomputed_flops(MIXTURE, 3, ("mlp", "moe_act")) == 5 * 3 * 192
    assert recomputed_flops(MIXTURE, 3, "full", layers=9) == 5 * (3 * 384 + 192)


def test_a_batchs_mean_is_of_each_sequences_own_length():
    lengths = [3, 9, 1]
    whole = sum(training_flops(DENSE, length, 1) for length in lengths)
    assert flops_per_token(DENSE, lengths, 3) == pytest.approx(whole / 13, rel=1e-15)
    assert flops_per_token(DENSE, lengths, 3, training=False) == pytest.approx(whole / 39, rel=1e-15)
    with pytest.raises(ValueError, match="0 tokens"):
        flops_per_token(DENSE, [], 0)


def test_attention_takes_over_with_the_length():
    architecture = architecture_of(CONFIGS["dense"])
    assert attention_flops(architecture, 1) == 4 * 4 * 8
    assert attention_flops(architecture, 2000) / attention_flops(architecture, 1000) == pytest.approx(
        4.0, rel=1e-3
    )
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert layer_flops_per_token(architecture) == linear


def test_a_models_names_are_gone_through_once(monkeypatch):
    from megatron_laser.config.model_folder import flops

    architecture = architecture_of(CONFIGS["experts"])
    calls = []
    original = flops.tensor_shapes
    monkeypatch.setattr(flops, "tensor_shapes", lambda one: calls.append(1) or original(one))
    layer_flops_per_token.cache_clear()
    for length in range(1, 50):
        forward_flops(architecture, length, 1)
    assert len(calls) == 1


def test_the_bubble_of_a_pipeline():
    assert pipeline_bubble(ParallelConfig(), [4]) == 0.0
    assert pipeline_bubble(ParallelConfig(pipeline=4), [9]) == pytest.approx(3 / 12)
    assert pipeline_bubble(ParallelConfig(pipeline=4, virtual_pipeline=3), [9]) == pytest.approx(1 / 10)
    assert pipeline_bubble(ParallelConfig(pipeline=4), [9, 3]) == pytest.approx(6 / 18)
