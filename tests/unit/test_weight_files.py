"""What the headers of a folder's safetensors files say about it: no weights are read, and nothing wrong gets past."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_laser.config import ModelFolderError, check_model_folder, model_folder_findings, resolve_plan
from megatron_laser.config.model_folder.architecture import architecture_from_dict
from megatron_laser.config.model_folder.parameters import EMBEDDING, HEAD, tensor_shapes
from megatron_laser.config.model_folder.safetensors_headers import INDEX, WEIGHTS, has_weight_files

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 40,
    "eos_token_id": 1,
}


def weights(**changes):
    """Random tensors for CONFIG with `changes`, as a folder of that model holds them."""
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(architecture_from_dict(CONFIG | changes))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder, tensors, shards=1, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if shards == 1:
        save_file(tensors, folder / WEIGHTS)
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model", weights())


def refusal(folder):
    """Why the folder is refused, in one line, and by model_folder_findings as well."""
    with pytest.raises(ModelFolderError) as error:
        check_model_folder(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text
    errors = [finding for finding in model_folder_findings(folder) if finding.level == "error"]
    assert errors and all(finding.text in text for finding in errors)
    return text


def findings(folder, **settings):
    found = model_folder_findings(folder, **settings)
    assert len({finding.topic for finding in found}) == len(found)
    return {finding.topic: finding for finding in found}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_good_folder_is_described_with_counts(tmp_path, shards, tied):
    folder = write(tmp_path / "model", weights(tie_word_embeddings=tied), shards, tie_word_embeddings=tied)
    check_model_folder(folder)
    found = findings(folder, dtype="bfloat16")
    assert [finding.level for finding in found.values()] == ["ok", "ok", "ok", "note"]
    count = 2 * 11 + (2 if tied else 3)
    assert f"{count} tensors in {shards} file" in found["weight files"].text
    assert ("is the embedding" in found["tied weights"].text) == tied
    assert "rounded to model.dtype bfloat16" in found["weight types"].text
    assert findings(folder, dtype="float32")["weight types"].level == "ok"


def test_no_weights_are_read(tmp_path):
    # 6 TiB that are not there: whoever read them would not come back
    config = {"hidden_size": 2**20, "intermediate_size": 2**18, "vocab_size": 2**17}
    header, end = {}, 0
    for name, shape in tensor_shapes(architecture_from_dict(CONFIG | config)).items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert end > 5 * 2**40
    check_model_folder(tmp_path)
    assert "GiB" in findings(tmp_path)["weight files"].text


class TestTensors:
    def test_a_missing_one_is_named(self, tmp_path):
        tensors = weights()
        del tensors["model.layers.1.mlp.up_proj.weight"]
        text = refusal(write(tmp_path / "model", tensors))
        assert "1 tensor missing" in text and "model.layers.1.mlp.up_proj.weight" in text

    def test_those_without_use_are_counted_and_some_named(self, tmp_path):
        extra = {
            f"model.layers.{i}.self_attn.{x}_proj.bias": torch.zeros(16) for i in range(2) for x in "qkv"
        }
        text = refusal(write(tmp_path / "model", weights() | extra))
        assert "6 tensors that a qwen3 model" in text
        assert "model.layers.0.self_attn.k_proj.bias" in text and "..." in text

    def test_more_layers_than_config_json_says_are_no_use(self, tmp_path):
        text = refusal(write(tmp_path / "model", weights(num_hidden_layers=3)))
        assert "11 tensors that" in text and "model.layers.2." in text

    @pytest.mark.parametrize(
        "name",
        [
            "v_head.weight",
            "score.weight",
            "_orig_mod.model.norm.weight",
            "lm_head.bias",
            "model.mtp.0.weight",
        ],
    )
    def test_no_other_tensor_is_overlooked(self, tmp_path, name):
        assert name in refusal(write(tmp_path / "model", weights() | {name: torch.zeros(3)}))

    def test_one_of_another_shape_is_named_with_both(self, tmp_path):
        text = refusal(write(tmp_path / "model", weights(vocab_size=48)))
        assert f"{EMBEDDING} is [48, 16], expected [40, 16]" in text and HEAD in text

    @pytest.mark.parametrize(
        "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    )
    def test_rotary_frequencies_of_older_exports_are_known(self, tmp_path, name):
        check_model_folder(write(tmp_path / "model", weights() | {name: torch.zeros(4, dtype=torch.int64)}))


class TestQuantizedWeights:
    @pytest.mark.parametrize(
        ("dtype", "kind"),
        [
            (torch.float8_e4m3fn, "F8_E4M3"),
            (torch.float8_e5m2, "F8_E5M2"),
            (torch.uint8, "U8"),
            (torch.int8, "I8"),
            (torch.int32, "I32"),
        ],
    )
    def test_codes_are_told_by_their_type(self, tmp_path, dtype, kind):
        name = "model.layers.0.mlp.up_proj.weight"
        text = refusal(write(tmp_path / "model", {**weights(), name: torch.ones(24, 16).to(dtype)}))
        assert f"1 of type {kind}" in text and f"{name} ({kind})" in text

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_what_only_needs_a_cast_is_taken(self, tmp_path, dtype):
        check_model_folder(write(tmp_path / "model", {k: v.to(dtype) for k, v in weights().items()}))

    @pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
    def test_a_file_that_says_so_is_enough(self, model, file):
        (model / file).write_text("{}")
        assert file in refusal(model)


class TestTiedEmbeddings:
    """One rule: the flag decides, and the file must agree."""

    def test_tied_without_a_head(self, tmp_path):
        check_model_folder(
            write(tmp_path / "model", weights(tie_word_embeddings=True), tie_word_embeddings=True)
        )

    @pytest.mark.parametrize("shards", [1, 2])
    def test_tied_with_the_same_head(self, tmp_path, shards):
        tensors = weights()
        tensors[HEAD] = tensors[EMBEDDING].clone()
        check_model_folder(write(tmp_path / "model", tensors, shards, tie_word_embeddings=True))

    @pytest.mark.parametrize(
        "change", [lambda head: head + 0, lambda head: head.half(), lambda head: head[:-1]]
    )
    def test_tied_with_another_head(self, tmp_path, change):
        tensors = weights()
        last = tensors[EMBEDDING].clone()
        last[-1, -1] += 1.0
        tensors[HEAD] = change(last)
        text = refusal(write(tmp_path / "model", tensors, tie_word_embeddings=True))
        assert "tie_word_embeddings true" in text and "set tie_word_embeddings to false" in text

    def test_tied_with_a_head_alone(self, tmp_path):
        tensors = weights()
        del tensors[EMBEDDING]
        assert EMBEDDING in refusal(write(tmp_path / "model", tensors, tie_word_embeddings=True))

    @pytest.mark.parametrize("flag", [{}, {"tie_word_embeddings": False}])
    def test_untied_without_a_head(self, tmp_path, flag):
        text = refusal(write(tmp_path / "model", weights(tie_word_embeddings=True), **flag))
        assert f"{HEAD} is missing" in text and "set tie_word_embeddings to true" in text


class TestBrokenFiles:
    def test_a_git_lfs_pointer(self, model):
        (model / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 7\n")
        assert f"{WEIGHTS} is a Git LFS pointer" in refusal(model)

    @pytest.mark.parametrize("keep", [0, 5, 8, 400, -1])
    def test_cut_off(self, model, keep):
        data = (model / WEIGHTS).read_bytes()
        (model / WEIGHTS).write_bytes(data[:keep])
        expected = {0: "is empty", 5: "is no safetensors file"}.get(keep, "is cut off")
        assert f"{WEIGHTS} {expected}" in refusal(model)

    @pytest.mark.parametrize(
        "garbage", [b"<!DOCTYPE html><html></html>", b"\0" * 4000, bytes(range(256)) * 16]
    )
    def test_something_else(self, model, garbage):
        (model / WEIGHTS).write_bytes(garbage)
        assert f"{WEIGHTS} is no safetensors file" in refusal(model)

    @pytest.mark.parametrize(
        "header",
        [
            "[]",
            "{",
            '{"a": 1}',
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
            '{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}',
            '{"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}}',
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            '{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        ],
    )
    def test_a_header_that_cannot_be(self, model, header):
        (model / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 8)
        assert f"{WEIGHTS} is no safetensors file: its header is broken" in refusal(model)

    def test_bytes_behind_the_last_tensor(self, model):
        with (model / WEIGHTS).open("ab") as file:
            file.write(b"more")
        assert "is damaged" in refusal(model)

    def test_a_link_to_nothing(self, model):
        (model / WEIGHTS).unlink()
        (model / WEIGHTS).symlink_to("../blobs/0123")
        assert has_weight_files(model)
        assert f"{WEIGHTS} cannot be read: No such file" in refusal(model)

    def test_no_weights_at_all(self, model):
        (model / WEIGHTS).unlink()
        assert not has_weight_files(model)
        assert f"neither {WEIGHTS} nor {INDEX} is there" in refusal(model)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("pytorch_model.bin", "save_pretrained"),
            ("model-00001-of-00002.safetensors", "download the index"),
        ],
    )
    def test_weights_of_another_kind(self, model, name, said):
        (model / WEIGHTS).rename(model / name)
        assert said in refusal(model)


class TestIndex:
    @pytest.fixture
    def model(self, tmp_path):
        return write(tmp_path / "model", weights(), shards=3)

    def change(self, model, change):
        index = json.loads((model / INDEX).read_text())
        change(index["weight_map"])
        (model / INDEX).write_text(json.dumps(index))

    def test_a_missing_shard(self, model):
        (model / "model-00002-of-00003.safetensors").unlink()
        assert "1 of 3 files that are not there: model-00002-of-00003.safetensors" in refusal(model)

    def test_a_cut_shard(self, model):
        file = model / "model-00003-of-00003.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        assert "model-00003-of-00003.safetensors is cut off" in refusal(model)

    def test_a_name_in_the_wrong_shard(self, model):
        name = list(weights())[1]  # in the second of three
        self.change(model, lambda names: names.update({name: "model-00001-of-00003.safetensors"}))
        assert (
            f"{name!r} is in model-00001-of-00003.safetensors, but it is in model-00002-of-00003.safetensors"
            in refusal(model)
        )

    def test_a_name_in_no_shard(self, model):
        self.change(model, lambda names: names.update(other="model-00001-of-00003.safetensors"))
        assert "'other' is in model-00001-of-00003.safetensors, which does not have it" in refusal(model)

    def test_a_tensor_in_two_shards(self, model):
        file = model / "model-00001-of-00003.safetensors"
        other = load_file(model / "model-00002-of-00003.safetensors")
        name = next(iter(other))
        save_file(load_file(file) | {name: other[name]}, file)
        assert f"{name!r} is in model-00001-of-00003.safetensors and in model-00002" in refusal(model)

    def test_a_single_file_beside_it(self, model):
        save_file(weights(), model / WEIGHTS)
        assert "remove the one that is old" in refusal(model)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\0"])
    def test_one_that_is_none(self, model, text):
        (model / INDEX).write_text(text)
        assert INDEX in refusal(model)


class TestNeighbours:
    def test_an_adapter_is_not_left_to_the_loader(self, model):
        (model / "adapter_config.json").write_text("{}")
        assert "an adapter lies beside the weights" in refusal(model)

    def test_files_that_only_servers_would_load_are_a_warning(self, model):
        save_file({"a": torch.zeros(1)}, model / "model-00001-of-00002.safetensors")
        check_model_folder(model)
        (warning,) = [finding for finding in model_folder_findings(model) if finding.level == "warning"]
        assert warning.examples == ("model-00001-of-00002.safetensors",)


def test_a_config_json_of_no_model_is_one_finding(model):
    (model / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": "wide"}))
    (finding,) = model_folder_findings(model)
    assert finding.level == "error" and "hidden_size" in finding.text and "\n" not in finding.text


def test_the_dry_run_refuses_weights_that_are_there_and_wrong_and_needs_none(model, tmp_path):
    from helpers.runs import run_config

    config = run_config(tmp_path / "run", model, "laser.score_token=2", "model.vocab_multiple=1")
    resolve_plan(config)
    (model / WEIGHTS).write_bytes(b"")
    with pytest.raises(ModelFolderError, match="is empty"):
        resolve_plan(config)
    (model / WEIGHTS).unlink()
    resolve_plan(config)
