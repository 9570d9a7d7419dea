"""FLOPs by a model's shape, against what torch counts in transformers' forward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from megatron_laser.config.derived import pipeline_bubble
from megatron_laser.config.model_folder.flops import attention_flops, forward_flops, layer_flops_per_token
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
CONFIGS = {
    "dense": Qwen2Config(**_SIZES, intermediate_size=48),
    "experts": Qwen3MoeConfig(
        **_SIZES,
        intermediate_size=48,
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
    ),
}


@pytest.mark.parametrize("length", [1, 7, 32])
@pytest.mark.parametrize("kind", CONFIGS)
def test_they_are_what_torch_counts_but_for_the_keys_that_a_mask_hides(kind, length):
    config = CONFIGS[kind]
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 90, (1, length)))
    architecture = architecture_of(config)
    counted = counter.get_total_flops()
    rotary = 2 * 4 * length  # inverse frequencies times positions
    # transformers multiplies all pairs, those in the future too
    all_pairs = 4 * 4 * architecture.head_dim * length**2 * 3
    expected = (
        forward_flops(architecture, length, length) - 3 * attention_flops(architecture, length) + all_pairs
    )
    assert counted == pytest.approx(expected, abs=rotary)


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
