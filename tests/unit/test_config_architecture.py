"""Reading config.json and counting parameters, against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_laser.config import (
    ConfigError,
    Layout,
    ModelFolderError,
    count_parameters,
    read_architecture,
    stage_parameters,
)
from megatron_laser.config.model_folder import architecture as architecture_module
from megatron_laser.config.model_folder.architecture import (
    SUPPORTED_MODEL_TYPES,
    architecture_from_dict,
)
from megatron_laser.config.model_folder.parameters import padded_vocab_size, rank_bytes

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 101,
}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def raw(model_type: str = "qwen2", **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SHAPE, **changes}


EXPERTS = {
    "qwen3_moe": dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, head_dim=16),
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=2),
}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PUBLISHED = sorted(file.parent.name for file in EXAMPLES.glob("*/config.json"))


def transformers_count(hf_config: Any) -> int:
    """Parameters of transformers' model, without their memory; a tied table is one of them."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config)
    model.tie_weights()
    return model.num_parameters()


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_parameter_count_is_that_of_the_transformers_model(tmp_path, model_type, tied):
    transformers = pytest.importorskip("transformers")
    shape = SHAPE | EXPERTS.get(model_type, {})
    hf_config = transformers.AutoConfig.for_model(model_type, **shape, tie_word_embeddings=tied)
    hf_config.save_pretrained(tmp_path)
    assert count_parameters(read_architecture(tmp_path)) == transformers_count(hf_config)


@pytest.mark.parametrize("example", PUBLISHED)
def test_the_parameter_count_of_every_recipe_is_that_of_the_transformers_model(example):
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.AutoConfig.from_pretrained(EXAMPLES / example)
    assert count_parameters(read_architecture(EXAMPLES / example)) == transformers_count(hf_config)


def test_the_parameter_count_of_qwen2_5_7b_is_the_published_one():
    architecture = architecture_from_dict(
        raw(
            hidden_size=3584,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            intermediate_size=18944,
            vocab_size=152064,
        )
    )
    assert count_parameters(architecture) == 7_615_616_512


def test_old_and_new_rope_keys_are_read():
    assert architecture_from_dict(raw(rope_theta=1e6)).rope_theta == 1e6
    new = architecture_from_dict(raw(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}))
    assert (new.rope_theta, new.rope_type) == (5e5, "default")
    scaled = architecture_from_dict(raw("llama", rope_theta=5e5, rope_scaling=LLAMA3))
    assert (scaled.rope_theta, scaled.rope_type) == (5e5, "llama3")
    assert architecture_from_dict(raw()).rope_theta == 10000.0


def test_left_out_keys_take_the_values_that_transformers_takes():
    llama = raw("llama")
    del llama["num_key_value_heads"]
    assert architecture_from_dict(llama).num_key_value_heads == 4
    assert architecture_from_dict(raw(num_key_value_heads=None)).num_key_value_heads == 4
    assert architecture_from_dict(raw("qwen2")).head_dim == 12
    assert architecture_from_dict(raw("qwen3")).head_dim == 128
    assert architecture_from_dict(raw("qwen3", head_dim=16)).head_dim == 16


def test_biases_and_norms_follow_the_model_type():
    flags = {
        name: (found.qkv_bias, found.qk_norm)
        for name in ("llama", "qwen2", "qwen3")
        for found in [architecture_from_dict(raw(name))]
    }
    assert flags == {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (raw("deepseek_v3"), "model_type 'deepseek_v3' is not supported; expected llama, qwen2, qwen3"),
        ({}, "model_type None is not supported"),
        (raw(hidden_size=None), "hidden_size: expected a positive integer, got None"),
        (raw(num_hidden_layers=0), "num_hidden_layers: expected a positive integer, got 0"),
        (raw(num_key_value_heads=3), "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        (raw(hidden_size=50), "hidden_size 50 is not divisible by num_attention_heads 4"),
        (raw(hidden_act="gelu"), "hidden_act: 'gelu'"),
        (raw(use_sliding_window=True), "use_sliding_window"),
        (raw("llama", attention_bias=True), "attention_bias"),
        (raw("llama", mlp_bias=True), "mlp_bias"),
        (raw(rope_scaling={"type": "yarn", "factor": 4}), "rope_type: 'yarn' is not supported"),
        (
            raw(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            "low_freq_factor: expected a number above 0",
        ),
        (raw(rope_scaling={"rope_type": "linear"}), "rope_type linear: factor: expected a number"),
        (raw(rope_theta="1e6"), "rope_theta: expected a number above 0, got '1e6'"),
        (raw(partial_rotary_factor=0.5), "partial_rotary_factor: 0.5"),
        (raw(tie_word_embeddings="false"), "tie_word_embeddings: expected true or false, got 'false'"),
        (raw(rms_norm_eps="1e-6"), "rms_norm_eps: expected a number above 0"),
        (raw(max_position_embeddings="4096"), "max_position_embeddings: expected a positive integer"),
        (raw(head_dim=None), "head_dim: expected a positive integer, got None"),
        (raw(head_dim=7), "head_dim 7 is odd"),
        (raw(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    ],
)
def test_models_that_cannot_be_built_are_refused(contents, expected):
    with pytest.raises(ConfigError) as error:
        architecture_from_dict(contents)
    assert expected in str(error.value)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_models_are_refused_by_their_method(key, method):
    with pytest.raises(ConfigError, match=f"{key}: weights quantized with {method} cannot be trained"):
        architecture_from_dict(raw(**{key: {"quant_method": method, "bits": 4}}))
    assert architecture_from_dict(raw(**{key: None})) == architecture_from_dict(raw())


def test_qwen_needs_its_key_value_heads_said():
    contents = raw()
    del contents["num_key_value_heads"]
    with pytest.raises(ConfigError, match="num_key_value_heads: required"):
        architecture_from_dict(contents)


# Every key that the two sides could read differently, with values that users have and values that nobody should.
SPELLINGS = [
    {},
    {"attention_bias": True},
    {"attention_bias": False},
    {"mlp_bias": True},
    {"tie_word_embeddings": True},
    {"hidden_act": "swish"},
    {"hidden_act": "gelu"},
    {"head_dim": 16},
    {"head_dim": None},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 3},
    {"rms_norm_eps": 1e-5},
    {"max_position_embeddings": 4096},
    {"rope_theta": 1e6},
    {"rope_theta": 500000},
    {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    {"use_sliding_window": True},
    {"layer_types": ["full_attention"] * 4},
    {"layer_types": ["sliding_attention"] * 4},
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": 1.0},
    {"quantization_config": {"quant_method": "fp8"}},
]


@pytest.mark.parametrize("change", SPELLINGS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_the_dry_run_and_the_trainer_take_the_same_folders_and_read_the_same_in_them(
    tmp_path, model_type, change
):
    hf_config = pytest.importorskip("megatron_laser.model.hf_config")
    (tmp_path / "config.json").write_text(json.dumps(raw(model_type, **change)))
    try:
        expected = read_architecture(tmp_path)
    except ConfigError as error:
        with pytest.raises(ConfigError) as again:
            hf_config.read_hf_config(tmp_path)
        assert str(again.value) == str(error)
        return
    config = hf_config.read_hf_config(tmp_path)  # compares what transformers reads with what we read
    assert hf_config.architecture_of(config) == expected
    assert len(hf_config.rope_inverse_frequencies(expected)) == expected.head_dim // 2


def test_what_only_transformers_refuses_is_said_with_the_file(tmp_path):
    hf_config = pytest.importorskip("megatron_laser.model.hf_config")
    (tmp_path / "config.json").write_text(json.dumps(raw(use_cache=[1])))
    with pytest.raises(
        ModelFolderError, match=r"config\.json: transformers cannot read it: .*use_cache"
    ) as error:
        hf_config.read_hf_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_default_of_transformers_that_is_not_ours_is_named(tmp_path, monkeypatch):
    hf_config = pytest.importorskip("megatron_laser.model.hf_config")
    (tmp_path / "config.json").write_text(json.dumps(raw()))
    monkeypatch.setattr(architecture_module, "_RMS_NORM_EPS", 1e-5)
    with pytest.raises(ModelFolderError, match="transformers reads rms_norm_eps 1e-06 instead of 1e-05"):
        hf_config.read_hf_config(tmp_path)


def test_a_folder_without_a_readable_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="absent is not a folder"):
        read_architecture(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(ConfigError, match="expected an object, got list"):
        read_architecture(tmp_path)


def test_the_padded_vocabulary_is_a_multiple_on_every_shard():
    assert padded_vocab_size(101, 1, 1) == 101
    assert padded_vocab_size(101, 2, 64) == 128
    assert padded_vocab_size(151936, 8, 128) == 152576
    assert padded_vocab_size(152576, 8, 128) == 152576


def test_one_rank_holds_the_whole_model_plus_the_padding():
    for tied, tables in ((False, 2), (True, 1)):
        arch = architecture_from_dict(raw(tie_word_embeddings=tied))
        (stage,) = stage_parameters(arch, Layout(), vocab_multiple=128)
        assert stage == count_parameters(arch) + tables * (128 - 101) * 48


def test_tensor_parallel_ranks_split_matrices_and_repeat_norms():
    arch = architecture_from_dict(raw("qwen3", head_dim=16))
    (whole,) = stage_parameters(arch, Layout(), vocab_multiple=128)
    (half,) = stage_parameters(arch, Layout(tensor=2), vocab_multiple=64)
    norms = 4 * (2 * 48 + 2 * 16) + 48
    assert 2 * half == whole + norms


def test_tied_embeddings_are_held_by_the_first_and_the_last_stage():
    arch = architecture_from_dict(raw(tie_word_embeddings=True))
    stages = stage_parameters(arch, Layout(pipeline=4), vocab_multiple=1)
    layer = stages[1]
    assert stages == (layer + 101 * 48, layer, layer, layer + 101 * 48 + 48)
    assert sum(stages) == count_parameters(arch) + 101 * 48


def test_stages_of_an_untied_model_add_up_to_the_model():
    arch = architecture_from_dict(raw())
    for layout in (Layout(pipeline=2), Layout(pipeline=2, virtual_pipeline=2), Layout(pipeline=4)):
        assert sum(stage_parameters(arch, layout, vocab_multiple=1)) == count_parameters(arch)


def test_bytes_follow_the_dtype_and_the_sharding():
    plain = rank_bytes(1000, "float32", shards=1, reference_model=False)
    assert (plain.weights, plain.gradients, plain.optimizer, plain.reference_model) == (4000, 4000, 8000, 0)
    sharded = rank_bytes(1000, "bfloat16", shards=7, reference_model=True)
    assert (sharded.weights, sharded.gradients, sharded.reference_model) == (2000, 4000, 2000)
    assert sharded.optimizer == 1715  # 12000 / 7, rounded up
    assert sharded.total == 2000 + 4000 + 1715 + 2000
