"""Published files and folders: links are written through, and everybody reads them whom the umask lets."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from megatron_laser.files import remove, replace_file, replace_folder, through_links, write_atomically
from megatron_laser.model.hf_folder import write_hf_folder
from megatron_laser.trainer.checkpoint import folder as folders


@pytest.fixture
def umask():
    """Sets the umask of this test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def export(folder, target, value=1.0, shard_bytes=10**6):
    source = folder / "source"
    source.mkdir(exist_ok=True)
    (source / "config.json").write_text("{}")
    weights = [("one", torch.full((4,), value)), ("two", torch.full((4,), value))]
    return write_hf_folder(
        iter(weights), target, source=source, dtype=torch.float32, max_shard_bytes=shard_bytes
    )


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("shard_bytes", [10**6, 1], ids=["one file", "two files"])
def test_exported_weights_have_the_mode_that_the_umask_gives(tmp_path, umask, mask, mode, shard_bytes):
    umask(mask)
    found = modes(export(tmp_path, tmp_path / "hf", shard_bytes=shard_bytes))
    assert any(name.endswith(".safetensors") for name in found)
    assert set(found.values()) == {mode}, found


@pytest.mark.parametrize("there", [True, False], ids=["a folder", "nothing yet"])
def test_an_export_goes_through_a_link_every_time(tmp_path, there):
    large = tmp_path / "large" / "hf"
    large.parent.mkdir()
    if there:
        export(tmp_path, large)
    (tmp_path / "hf").symlink_to(os.path.join("large", "hf"))
    for value in (2.0, 3.0):
        export(tmp_path, tmp_path / "hf", value)
        assert (tmp_path / "hf").is_symlink()
        assert load_file(large / "model.safetensors")["one"].tolist() == [value] * 4
    assert [path.name for path in large.parent.iterdir()] == ["hf"]


def test_a_linked_file_is_written_where_it_lies(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "large" / "metrics.jsonl")
    for text in ("one", "two"):
        write_atomically(tmp_path / "metrics.jsonl", text)
    assert (tmp_path / "metrics.jsonl").is_symlink()
    assert (tmp_path / "large" / "metrics.jsonl").read_text() == "two"
    assert len(list((tmp_path / "large").iterdir())) == 1


def published(root, step, text):
    partial = folders.partial_folder(root, step)
    partial.mkdir(parents=True)
    (partial / "file").write_text(text)
    return folders.publish(partial, {"step": step}, {})


def test_a_linked_checkpoint_is_replaced_and_pruned_without_a_rest(tmp_path):
    root, archive = tmp_path / "checkpoints", tmp_path / "archive"
    for step in (1, 2):
        published(root, step, "old").rename(archive.with_name(f"archive_{step}"))
        (root / f"step_{step:08d}").symlink_to(tmp_path / f"archive_{step}")
    published(root, 2, "new")
    folders.retain(root, keep_last=1, keep_every=0)
    assert [path.name for path in root.iterdir()] == ["step_00000002"]
    assert (root / "step_00000002" / "file").read_text() == "new"
    assert (tmp_path / "archive_1" / "file").read_text() == "old"  # whoever moved it there keeps it


def test_a_folder_that_cannot_be_replaced_is_as_before(tmp_path, monkeypatch):
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename, calls = os.replace, []

    def busy(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(OSError, match="busy"):
        replace_folder(tmp_path / "new", tmp_path / "target", aside=tmp_path / "old")
    assert (tmp_path / "target" / "file").read_text() == "target"
    assert (tmp_path / "new" / "file").read_text() == "new"


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove(tmp_path / "link")
    remove(tmp_path / "not there")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert through_links(tmp_path / "kept") == tmp_path.resolve() / "kept"


def test_a_pipe_is_written_into_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "complete").write_text("text")
    replace_file(tmp_path / "complete", pipe)
    assert os.read(reading, 100) == b"text" and pipe.is_fifo()
    assert not (tmp_path / "complete").exists()
    os.close(reading)
