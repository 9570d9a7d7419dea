"""Hugging Face tensors to Megatron shards and back, without process groups; and loading into a model."""

import pytest
import torch
from helpers.models import FAMILIES, disk_tensors, save_tiny_model, tiny_config, tiny_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_laser.config import ConfigError, ModelFolderError, padded_vocab_size
from megatron_laser.config.model_folder.parameters import tensor_shapes
from megatron_laser.model import platform

platform.install()

from megatron_laser.model.hf_config import (  # noqa: E402
    architecture_of,
    read_hf_config,
    rope_inverse_frequencies,
    transformer_config,
)
from megatron_laser.model.hf_folder import HfFolder, write_hf_folder  # noqa: E402
from megatron_laser.model.mapping import ALIASES, Geometry, global_names, rules  # noqa: E402
from megatron_laser.model.policy_model import PolicyModel  # noqa: E402
from megatron_laser.model.weights import WeightExporter, load_weights  # noqa: E402


class RecordingReader:
    """A TensorReader over a dict that adds up the elements it hands out."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.elements = 0

    def _give(self, tensor):
        self.elements += tensor.numel()
        return tensor

    def rows(self, name, start, stop):
        assert 0 <= start <= stop <= len(self.tensors[name])
        return self._give(self.tensors[name][start:stop])

    def columns(self, name, start, stop):
        return self._give(self.tensors[name][:, start:stop])

    def full(self, name):
        return self._give(self.tensors[name])


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_put_together_again_are_bit_identical(family, tensor):
    changes = {"num_key_value_heads": 4, "num_attention_heads": 8} if tensor == 4 else {}
    config = tiny_config(family, **changes)
    tensors = disk_tensors(tiny_model(family, **changes))
    geometry = Geometry.of(config, tensor=tensor, vocab_multiple=16, expert_tensor=tensor)
    exported = {}
    for rule in rules(config):
        sizes = rule.geometry(geometry)
        shards = [rule.layout.load(RecordingReader(tensors), rule.hf, sizes, rank) for rank in range(tensor)]
        assert len({shard.shape for shard in shards}) == 1
        if rule.exported:
            exported |= dict(zip(rule.hf, rule.layout.export(shards, sizes), strict=True))
    expected = set(tensors) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert set(exported) == expected
    assert all(torch.equal(value, tensors[name]) for name, value in exported.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_and_the_check_of_a_folder_know_the_tensors_that_transformers_has(family):
    config = tiny_config(family)
    shapes = tensor_shapes(architecture_of(config))
    assert set(shapes) == {name for rule in rules(config) for name in rule.hf}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    there = disk_tensors(tiny_model(family))
    assert shapes == {name: tuple(p.shape) for name, p in there.items() if name not in tied}


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_read_each_matrix_element_once_between_them(family):
    config = tiny_config(family)
    tensors = disk_tensors(tiny_model(family))
    geometry = Geometry.of(config, tensor=2, vocab_multiple=16, expert_tensor=2)
    for rule in rules(config):
        readers = [RecordingReader(tensors) for _ in range(2)]
        for rank, reader in enumerate(readers):
            rule.layout.load(reader, rule.hf, rule.geometry(geometry), rank)
        size = sum(tensors[name].numel() for name in rule.hf)
        is_whole = "norm" in rule.megatron or "router" in rule.megatron
        assert sum(reader.elements for reader in readers) == (2 * size if is_whole else size), rule.megatron


def test_vocabulary_padding_is_zero_and_a_shard_may_be_nothing_else():
    config = tiny_config("qwen2")
    tensors = tiny_model("qwen2").state_dict()
    embedding = rules(config)[0]
    geometry = Geometry.of(config, tensor=2, vocab_multiple=256)
    assert geometry.padded_vocab == 512
    shards = [embedding.layout.load(RecordingReader(tensors), embedding.hf, geometry, r) for r in range(2)]
    assert [len(shard) for shard in shards] == [256, 256]
    assert torch.equal(shards[0][:250], tensors["model.embed_tokens.weight"])
    assert not shards[0][250:].any() and not shards[1].any()


def test_query_key_value_rows_are_grouped_by_kv_head():
    config = tiny_config("qwen2")  # 4 query heads, 2 kv heads, head_dim 16
    tensors = {name: torch.zeros_like(value) for name, value in tiny_model("qwen2").state_dict().items()}
    prefix = "model.layers.0.self_attn."
    for name, heads, base in (("q_proj", 4, 10), ("k_proj", 2, 20), ("v_proj", 2, 30)):
        for head in range(heads):
            tensors[f"{prefix}{name}.bias"][16 * head : 16 * (head + 1)] = base + head
    (rule,) = [
        rule for rule in rules(config) if rule.megatron.endswith("layers.0.self_attention.linear_qkv.bias")
    ]
    for tensor, expected in (
        (1, [[10, 11, 20, 30, 12, 13, 21, 31]]),
        (2, [[10, 11, 20, 30], [12, 13, 21, 31]]),
    ):
        geometry = Geometry.of(config, tensor=tensor, vocab_multiple=1)
        for rank in range(tensor):
            shard = rule.layout.load(RecordingReader(tensors), rule.hf, geometry, rank)
            assert shard[::16].tolist() == expected[rank]


def test_padded_vocabulary_splits_into_multiples():
    assert padded_vocab_size(151936, 1, 128) == 151936
    assert padded_vocab_size(151936, 8, 128) == 152576
    for tensor in (1, 2, 4, 8):
        padded = padded_vocab_size(250, tensor, 16)
        assert padded % (16 * tensor) == 0 and 250 <= padded < 250 + 16 * tensor


def test_transformer_engine_names_lead_to_the_same_rules():
    names = {rule.megatron for rule in rules(tiny_config("qwen3"))}
    for alias in ALIASES.values():
        assert f"decoder.layers.0.{alias}" in names

    class Layer(torch.nn.Module):
        layer_number = 3  # global, from 1

        def __init__(self):
            super().__init__()
            self.self_attention = torch.nn.Module()
            self.self_attention.linear_qkv = torch.nn.Module()
            self.self_attention.linear_qkv.layer_norm_weight = torch.nn.Parameter(torch.ones(2))

    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([Layer()])
    assert list(global_names([chunk])) == ["decoder.layers.2.input_layernorm.weight"]


@pytest.mark.parametrize("grouped", [False, True], ids=["one module each", "grouped"])
def test_a_ranks_experts_are_known_by_their_number_among_all(grouped):
    class Layer(torch.nn.Module):
        layer_number = 2  # global, from 1

        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Module()
            self.mlp.local_expert_indices = [6, 7]
            self.mlp.experts = torch.nn.Module()
            weights = {n: torch.nn.Parameter(torch.full((1,), float(n))) for n in (0, 1)}
            if grouped:
                self.mlp.experts.linear_fc1 = torch.nn.Module()
                for n, weight in weights.items():
                    self.mlp.experts.linear_fc1.register_parameter(f"weight{n}", weight)
            else:
                self.mlp.experts.local_experts = torch.nn.ModuleList(torch.nn.Module() for _ in weights)
                for module, weight in zip(self.mlp.experts.local_experts, weights.values()):
                    module.linear_fc1 = torch.nn.Module()
                    module.linear_fc1.weight = weight

    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([Layer()])
    found = {name: float(parameter.detach()) for name, parameter in global_names([chunk]).items()}
    names = {rule.megatron for rule in rules(tiny_config("qwen3-moe"))}
    assert found == {f"decoder.layers.1.mlp.experts.{n}.linear_fc1.weight": n - 6 for n in (6, 7)}
    assert found.keys() < names


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_are_those_of_transformers(family):
    model = tiny_model(family)
    got = rope_inverse_frequencies(architecture_of(model.config))
    torch.testing.assert_close(got, model.model.rotary_emb.inv_freq, rtol=0, atol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 3},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
    ],
    ids=str,
)
def test_scaled_rotary_frequencies_are_those_of_transformers(rope):
    config = tiny_config("llama3-rope", rope_parameters=rope, hidden_size=512, max_position_embeddings=131072)
    expected, attention = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    got = rope_inverse_frequencies(architecture_of(config))
    assert attention == 1.0
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_llama3_scaling_changes_some_frequencies():
    plain = rope_inverse_frequencies(
        architecture_of(tiny_config("llama3-rope", rope_parameters={"rope_theta": 10000.0}))
    )
    scaled = rope_inverse_frequencies(architecture_of(tiny_config("llama3-rope")))
    changed = (plain != scaled).sum().item()
    assert 0 < changed < len(plain)


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn"])
def test_rope_types_that_are_not_covered_are_refused(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match=rope_type):
        rope_inverse_frequencies(architecture_of(tiny_config("llama3-rope", rope_parameters=rope)))


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama3-rope", {"attention_bias": True}, "attention_bias"),
        ("llama3-rope", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_architectures_that_are_not_covered_are_refused_by_their_setting(tmp_path, family, change, named):
    tiny_config(family, **change).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=named):
        read_hf_config(tmp_path)


def test_unsupported_model_type_is_refused_with_the_supported_ones(tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"gpt2.*llama, qwen2, qwen3"):
        read_hf_config(tmp_path)


def build(config):
    return PolicyModel(transformer_config(config, dtype=torch.float32), config, vocab_multiple=16)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_sets_every_parameter_and_exports_the_same(single_process, tmp_path, family):
    original = disk_tensors(save_tiny_model(tmp_path, family))
    config = read_hf_config(tmp_path)
    geometry = Geometry.of(config, tensor=1, vocab_multiple=16)
    model = build(config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with HfFolder(tmp_path) as folder:
        load_weights([model], folder, config, geometry)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    exported = dict(WeightExporter([model], config, geometry).stream())
    assert all(torch.equal(exported[name], original[name]) for name in exported)
    assert set(exported) == set(original) - ({"lm_head.weight"} if config.tie_word_embeddings else set())


def test_a_missing_tensor_is_named(single_process, tmp_path):
    model = save_tiny_model(tmp_path, "qwen2")
    state = model.state_dict()
    del state["model.layers.2.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    config = read_hf_config(tmp_path)
    with HfFolder(tmp_path) as folder, pytest.raises(ModelFolderError, match=r"layers\.2\.mlp\.up_proj"):
        load_weights([build(config)], folder, config, Geometry.of(config, tensor=1, vocab_multiple=16))


def test_weights_of_another_size_are_refused(single_process, tmp_path):
    save_tiny_model(tmp_path, "qwen2", intermediate_size=128)
    config = tiny_config("qwen2")  # says 96
    wide = tiny_config("qwen2", intermediate_size=128)
    with HfFolder(tmp_path) as folder, pytest.raises(ValueError, match=r"gate_proj.*config\.json"):
        load_weights([build(config)], folder, config, Geometry.of(wide, tensor=1, vocab_multiple=16))


def test_weights_taller_than_config_json_says_are_refused(single_process, tmp_path):
    save_tiny_model(tmp_path, "qwen2", intermediate_size=128)
    config = tiny_config("qwen2")  # 96 rows of the 128 would fit the parameter
    with HfFolder(tmp_path) as folder, pytest.raises(ValueError, match=r"config\.json"):
        load_weights([build(config)], folder, config, Geometry.of(config, tensor=1, vocab_multiple=16))


def save_changed(folder, family, change):
    """A tiny model's folder whose tensors have been through `change`."""
    model = save_tiny_model(folder, family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    change(state)
    write_hf_folder(state.items(), folder, source=folder, dtype=torch.float32)


def load(folder):
    config = read_hf_config(folder)
    geometry = Geometry.of(config, tensor=1, vocab_multiple=16)
    model = build(config)
    with HfFolder(folder) as reader:
        load_weights([model], reader, config, geometry)
    return dict(WeightExporter([model], config, geometry).stream())


def test_tensors_that_no_rule_uses_are_named(single_process, tmp_path):
    bias = "model.layers.3.self_attn.q_proj.bias"
    save_changed(tmp_path / "model", "qwen3", lambda state: state.update({bias: torch.zeros(128)}))
    with pytest.raises(
        ModelFolderError, match=r"1 tensor that a qwen3 model .*layers\.3\.self_attn\.q_proj\.bias"
    ):
        load(tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_named_with_their_file(single_process, tmp_path, value):
    name = "model.layers.1.self_attn.v_proj.weight"
    save_changed(tmp_path / "model", "qwen2", lambda state: state[name].view(-1)[-1:].fill_(value))
    with pytest.raises(ModelFolderError, match=rf"model\.safetensors: tensor '{name}' holds NaN or infinity"):
        load(tmp_path / "model")


def test_a_head_that_is_the_embedding_is_taken_and_not_exported_where_they_are_tied(single_process, tmp_path):
    embedding = "model.embed_tokens.weight"
    save_changed(
        tmp_path / "model",
        "qwen2-tied",
        lambda state: state.update({"lm_head.weight": state[embedding].clone()}),
    )
    exported = load(tmp_path / "model")
    assert "lm_head.weight" not in exported and embedding in exported
    save_changed(
        tmp_path / "other", "qwen2-tied", lambda state: state.update({"lm_head.weight": 2 * state[embedding]})
    )
    with pytest.raises(ModelFolderError, match="another lm_head"):
        load(tmp_path / "other")


def test_a_parameter_that_no_rule_exports_is_not_left_out_in_silence(single_process):
    config = tiny_config("qwen2")
    model = build(config)
    model.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(KeyError, match="extra"):
        WeightExporter([model], config, Geometry.of(config, tensor=1, vocab_multiple=16))
