"""Reading and writing Hugging Face folders."""

import json

import pytest
import torch
from helpers.models import save_tiny_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_laser.algorithms.numerics import is_finite
from megatron_laser.config import ModelFolderError
from megatron_laser.model.hf_folder import HfFolder, write_hf_folder


def source_folder(path):
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "torch_dtype": "float16", "keep": 3})
    )
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ x }}")
    (path / "model.safetensors.index.json").write_text("{}")
    (path / "pytorch_model.bin").write_text("old")
    (path / "training_args.json").write_text("{}")
    (path / "model.safetensors").write_text("old")
    return path


def weights():
    generator = torch.Generator().manual_seed(0)
    for index in range(5):
        yield f"layer.{index}", torch.randn(4, 8, generator=generator)


@pytest.mark.parametrize("limit", [10**6, 300, 1], ids=["one file", "two per file", "one per file"])
def test_what_is_written_is_read_back_exactly_and_in_parts(tmp_path, limit):
    source = source_folder(tmp_path / "source")
    target = write_hf_folder(
        weights(), tmp_path / "out", source=source, dtype=torch.float32, max_shard_bytes=limit
    )
    with HfFolder(target) as folder:
        assert folder.names() == [name for name, _ in weights()]
        for name, tensor in weights():
            assert folder.shape(name) == (4, 8)
            assert torch.equal(folder.full(name), tensor)
            assert torch.equal(folder.rows(name, 1, 3), tensor[1:3])
            assert torch.equal(folder.columns(name, 2, 7), tensor[:, 2:7])
            assert folder.rows(name, 4, 4).shape == (0, 8)
    files = sorted(file.name for file in target.glob("*.safetensors"))
    expected = {10**6: 1, 300: 3, 1: 5}[limit]
    assert len(files) == expected
    index = target / "model.safetensors.index.json"
    assert index.is_file() == (expected > 1)
    if expected > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == 5 * 4 * 8 * 4
        assert sorted(set(content["weight_map"].values())) == files
        assert files[0] == f"model-00001-of-{expected:05d}.safetensors"


def test_what_belongs_to_the_model_is_copied_old_weights_are_not_and_the_dtype_is_stated(tmp_path):
    source = source_folder(tmp_path / "source")
    target = write_hf_folder(weights(), tmp_path / "out", source=source, dtype=torch.bfloat16)
    assert {file.name for file in target.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    assert json.loads((target / "config.json").read_text()) == {
        "model_type": "qwen2",
        "keep": 3,
        "dtype": "bfloat16",
    }
    with HfFolder(target) as folder:
        assert folder.full("layer.0").dtype == torch.bfloat16


def test_an_interrupted_export_leaves_the_earlier_one_untouched(tmp_path):
    source = source_folder(tmp_path / "source")
    target = write_hf_folder(weights(), tmp_path / "out", source=source, dtype=torch.float32)

    def broken():
        yield "layer.0", torch.zeros(4, 8)
        raise ConnectionError("rank 1 went away")

    with pytest.raises(ConnectionError):
        write_hf_folder(broken(), target, source=source, dtype=torch.float32, max_shard_bytes=1)
    with HfFolder(target) as folder:
        assert folder.names() == [name for name, _ in weights()]
        assert torch.equal(folder.full("layer.0"), next(weights())[1])
    again = write_hf_folder(
        (("other", torch.ones(2)) for _ in range(1)), target, source=source, dtype=torch.float32
    )
    with HfFolder(again) as folder:
        assert folder.names() == ["other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_folder_can_be_exported_onto_itself(tmp_path):
    model = save_tiny_model(tmp_path / "model", "qwen2-tied")
    doubled = ((name, 2 * tensor) for name, tensor in model.named_parameters())
    write_hf_folder(doubled, tmp_path / "model", source=tmp_path / "model", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    for (_, got), (_, want) in zip(loaded.named_parameters(), model.named_parameters()):
        assert torch.equal(got, 2 * want)


def test_shared_memory_and_views_are_written_as_they_are_at_that_moment(tmp_path):
    source = source_folder(tmp_path / "source")
    whole = torch.arange(12.0).reshape(4, 3)

    def views():
        yield "transposed", whole.T
        yield "half", whole[:2]
        whole.zero_()  # the next optimizer step

    write_hf_folder(views(), tmp_path / "out", source=source, dtype=torch.float32)
    with HfFolder(tmp_path / "out") as folder:
        assert torch.equal(folder.full("transposed"), torch.arange(12.0).reshape(4, 3).T)
        assert torch.equal(folder.full("half"), torch.arange(6.0).reshape(2, 3))


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match=r"model\.path .*model\.safetensors"):
        HfFolder(tmp_path)


def test_an_unknown_tensor_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with HfFolder(tmp_path) as folder, pytest.raises(ModelFolderError, match="'b' is missing"):
        folder.full("b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, 50, 999, 1000])
def test_nan_and_infinity_are_seen_wherever_they_are(dtype, place):
    tensor = torch.randn(1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(tensor) and is_finite(tensor[:0]) and is_finite(tensor.reshape(7, 143)[:, 3:5])
    for value in ("nan", "inf", "-inf"):
        tensor[place] = float(value)
        assert not is_finite(tensor), value


def test_only_what_is_read_is_looked_through(tmp_path):
    tensor = torch.ones(4, 4)
    tensor[3, 0] = torch.nan
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    with HfFolder(tmp_path) as folder:
        assert folder.rows("a", 0, 3).sum() == 12 and folder.columns("a", 1, 4).sum() == 12
        for read in (
            lambda: folder.full("a"),
            lambda: folder.rows("a", 3, 4),
            lambda: folder.columns("a", 0, 1),
        ):
            with pytest.raises(ModelFolderError, match=r"model\.safetensors: tensor 'a' holds NaN"):
                read()
