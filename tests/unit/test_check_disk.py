"""What a run writes and whether there is room: sizes by hand, free space as given."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from helpers.models import save_tiny_model
from helpers.runs import run_config

from megatron_laser.config import count_parameters, read_architecture
from megatron_laser.run.preflight.machine import disk_findings, disk_needs, folder_finding

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


@pytest.fixture(scope="module")
def parameters(model):
    return count_parameters(read_architecture(model))


def config(tmp_path, folder, *overrides, **sections):
    run = {"steps": 100, "output_dir": str(tmp_path / "run")}
    return run_config(tmp_path, folder, *overrides, run=run, **sections)


@pytest.mark.parametrize(("dtype", "state", "weights"), [("float32", 12, 4), ("bfloat16", 14, 2)])
def test_checkpoints_and_the_export(tmp_path, model, parameters, dtype, state, weights):
    settings = {"checkpoint": {"every": 10, "keep_last": 2}}
    checkpoints, export = disk_needs(config(tmp_path, model, f"model.dtype={dtype}", **settings))
    assert checkpoints.folder == tmp_path / "run" / "checkpoints"
    assert (checkpoints.first, checkpoints.most) == (state * parameters, 3 * state * parameters)
    assert checkpoints.what.startswith("3 checkpoints of ")
    assert (export.first, export.most) == (weights * parameters, weights * parameters)


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        ({"every": 100}, 1),  # the only one
        ({"every": 60}, 2),  # steps 60 and 100
        (
            {"every": 10, "keep_last": 1, "keep_every": 50},
            4,
        ),  # 50 and 100 for good, the newest, and a new one
    ],
)
def test_how_many_checkpoints_there_are_at_the_fullest_moment(tmp_path, model, parameters, checkpoint, kept):
    needs = list(disk_needs(config(tmp_path, model, checkpoint={**checkpoint, "export_hf": False})))
    assert [need.most for need in needs] == [kept * 12 * parameters]


def test_what_a_run_that_goes_on_has_written_already_counts(tmp_path, model, parameters):
    old = tmp_path / "run" / "checkpoints" / "step_00000010"
    old.mkdir(parents=True)
    (old / "weights").write_bytes(b"x" * 1000)
    (need,) = disk_needs(config(tmp_path, model, checkpoint={"every": 100, "export_hf": False}))
    assert (need.first, need.most) == (0, 12 * parameters - 1000)


def test_weights_for_servers_and_responses(tmp_path, model, parameters):
    settings = {
        "checkpoint": {"every": 0, "export_hf": False},
        "rollout": {"engine": "sglang", "weight_sync": "disk", "sync_folder": str(tmp_path / "sync")},
        "logging": {"rollouts_every": 10},
    }
    weights, responses = disk_needs(config(tmp_path, model, **settings))
    assert weights.folder == tmp_path / "sync" and weights.most == 2 * 4 * parameters
    assert (
        responses.most == 10 * 4 * 4 * 64 * 4 and not responses.certain
    )  # dumps, prompts, samples, tokens, bytes


@pytest.mark.parametrize(
    ("bytes_per_parameter", "level", "words"),
    [
        (15, "error", "nothing could be saved"),
        (20, "warning", "together"),
        (41, "ok", "free; the run writes"),
    ],
)
def test_free_space_decides(tmp_path, model, parameters, monkeypatch, bytes_per_parameter, level, words):
    free = bytes_per_parameter * parameters
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    (finding,) = disk_findings(config(tmp_path, model, checkpoint={"every": 10, "keep_last": 2}))
    assert finding.level == level and words in finding.text
    assert bool(finding.cure) == (level != "ok")


def test_a_bound_that_responses_may_reach_is_only_a_note(tmp_path, model, parameters, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 20 * parameters))
    settings = {"logging": {"rollouts_every": 1}, "rollout": {"prompts_per_step": 400}}
    (finding,) = disk_findings(config(tmp_path, model, checkpoint={"every": 100}, **settings))
    assert finding.level == "note" and "if every response is the longest" in finding.text


def test_checkpoints_that_are_moved_aside_make_no_room(tmp_path, model, parameters, monkeypatch):
    old = tmp_path / "run" / "checkpoints" / "step_00000010"
    old.mkdir(parents=True)
    (old / "weights").write_bytes(bytes(40 * parameters))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 6 * parameters))
    settings = config(tmp_path, model, checkpoint={"every": 10, "keep_last": 1})
    assert [disk_findings(settings, overwrite=o)[0].level for o in (False, True)] == ["ok", "error"]


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    assert folder_finding("run.output_dir", file / "run").text == f"{file / 'run'}: {file} is a file"
    assert folder_finding("run.output_dir", file).level == "error"
    assert folder_finding("run.output_dir", tmp_path / "a" / "b").text.endswith("will be made")
    assert folder_finding("run.output_dir", tmp_path).text.endswith("is there")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written by this user" in folder_finding("run.output_dir", Path("/nowhere/x")).text
