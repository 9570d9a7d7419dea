"""Whole runs whose writes fail: what can be saved is saved, and the same command goes on."""

import os
import shutil
import sys

import pytest
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import before_recording, checkpoint_digests, run

from megatron_laser.config import ConfigError, load_config
from megatron_laser.evaluation import validation
from megatron_laser.loop import train
from megatron_laser.observability import metrics_logger as sinks
from megatron_laser.observability.metrics_logger import MetricsLogger
from megatron_laser.rewards import GradingPool
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.run import export
from megatron_laser.run import recorder as run_record
from megatron_laser.run.output_folder import claim_output_folder
from megatron_laser.run.ranks import RunEnded
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint import torch_dist
from megatron_laser.trainer.checkpoint.folder import CheckpointError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(YAML file, output folder) of a run of 4 steps in one go."""
    file = write_tiny_run(tmp_path_factory.mktemp("run"))
    return file, train(load_config(file, ["run.output_dir=" + str(file.parent / "undisturbed")]))


def test_a_failed_save_is_survived_but_a_failed_last_save_is_an_error(
    undisturbed, tmp_path, monkeypatch, caplog
):
    file, expected = undisturbed
    write = torch_dist.write_sharded

    def full_at(entries, folder, group):
        if folder.name == broken:
            full()
        write(entries, folder, group)

    monkeypatch.setattr(torch_dist, "write_sharded", full_at)
    broken = "step_00000002.partial"
    run(file, tmp_path / "out")
    assert (
        "the checkpoint was not saved, the last published one stays valid: OSError: [Errno 28]" in caplog.text
    )
    assert metrics_without_times(tmp_path / "out") == metrics_without_times(expected)
    broken = "step_00000004.partial"
    with pytest.raises(CheckpointError, match="all steps are done, but the last save failed: OSError"):
        run(file, tmp_path / "last")
    assert (tmp_path / "last" / "report.md").exists()
    assert [step for step, _ in folders.published(tmp_path / "last" / "checkpoints")] == [2]
    broken = ""
    run(file, tmp_path / "last")
    assert (tmp_path / "last" / "FINISHED").exists()
    assert metrics_without_times(tmp_path / "last") == metrics_without_times(expected)


def full(*arguments, **settings):
    raise OSError(28, "No space left on device")


def test_a_step_whose_metrics_cannot_be_written_is_saved_with_them_and_the_run_stops(
    undisturbed, tmp_path, monkeypatch
):
    file, expected = undisturbed
    append = MetricsLogger._append

    def full_at_three(self, text):
        if '"step": 3' in text:
            full()
        append(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "_append", full_at_three)
        with pytest.raises(
            RunEnded, match=r"^saved after step 3 and stopped: .*metrics.jsonl cannot be written"
        ):
            run(file, tmp_path / "out")
    assert len(metrics_without_times(tmp_path / "out")) == 2
    run(file, tmp_path / "out")
    assert metrics_without_times(tmp_path / "out") == metrics_without_times(expected)
    assert checkpoint_digests(tmp_path / "out", 4) == checkpoint_digests(expected, 4)


def test_what_people_look_at_may_all_fail_and_the_run_is_done_all_the_same(
    undisturbed, tmp_path, monkeypatch, caplog
):
    file, expected = undisturbed
    for name in ("dump_rollouts", "write_report"):
        monkeypatch.setattr(run_record, name, full)
    monkeypatch.setattr(sinks, "_tensorboard_writer", full)
    monkeypatch.setattr(InProcessEngine, "close", full, raising=False)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        run(file, tmp_path / "out", "logging.tensorboard=true", "logging.rollouts_every=1")
    for what in ("logging.rollouts_every", "writing report.md", "logging.tensorboard", "standard output"):
        assert caplog.text.count(f"{what} failed (") == 1
    assert "closing the rollout engine failed: OSError: [Errno 28] No space left on device" in caplog.text
    assert metrics_without_times(tmp_path / "out") == metrics_without_times(expected)
    assert (tmp_path / "out" / "FINISHED").exists()


def test_a_deleted_output_folder_is_noticed_in_the_same_step_and_the_weights_are_saved(
    undisturbed, tmp_path, monkeypatch
):
    file, expected = undisturbed
    with monkeypatch.context() as patch:
        before_recording(patch, 3, lambda: shutil.rmtree(tmp_path / "out"))
        with pytest.raises(
            RunEnded, match=r"^saved after step 3 and stopped: .* was deleted, moved or replaced"
        ):
            run(file, tmp_path / "out")
    run(file, tmp_path / "out")
    assert metrics_without_times(tmp_path / "out") == metrics_without_times(expected)[2:]
    assert checkpoint_digests(tmp_path / "out", 4) == checkpoint_digests(expected, 4)


def test_a_folder_that_another_run_has_taken_meanwhile_is_left_alone(undisturbed, tmp_path, monkeypatch):
    file, _ = undisturbed

    def taken():
        (tmp_path / "out").rename(tmp_path / "moved")
        claim_output_folder(load_config(file, [f"run.output_dir={tmp_path / 'out'}"])).release()

    before_recording(monkeypatch, 3, taken)
    with pytest.raises(ConfigError, match="was deleted under a live run, and holds another one by now"):
        run(file, tmp_path / "out")
    assert folders.published(tmp_path / "out" / "checkpoints") == []
    assert [step for step, _ in folders.published(tmp_path / "moved" / "checkpoints")] == [2]


def test_an_export_that_fails_leaves_a_run_that_the_same_command_finishes(undisturbed, tmp_path, monkeypatch):
    file, _ = undisturbed
    settings = ["checkpoint.export_hf=true", "run.steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_hf_folder", full)
        with pytest.raises(RunEnded, match=r"^all 2 steps are done: .*hf cannot be written: .*No space left"):
            run(file, tmp_path / "out", *settings)
    assert not (tmp_path / "out" / "FINISHED").exists()
    assert (tmp_path / "out" / "report.md").exists()
    run(file, tmp_path / "out", *settings)
    assert (tmp_path / "out" / "hf" / "model.safetensors").exists()
    assert (tmp_path / "out" / "FINISHED").exists()


def test_a_full_disk_in_an_evaluation_is_a_reason_to_save_and_stop(undisturbed, tmp_path, monkeypatch):
    file, _ = undisturbed
    monkeypatch.setattr(validation, "evaluate", full)
    with pytest.raises(RunEnded, match=r"^saved after step 2 and stopped: .*No space left on device"):
        run(file, tmp_path / "out", f"data.validation={file.parent / 'train.jsonl'}", "evaluation.every=2")
    assert [step for step, _ in folders.published(tmp_path / "out" / "checkpoints")] == [2]


def test_a_start_that_fails_late_closes_what_it_has_started(undisturbed, tmp_path, monkeypatch):
    file, _ = undisturbed
    closed = []
    monkeypatch.setattr(
        GradingPool, "close", lambda self, close=GradingPool.close: (closed.append(1), close(self))
    )
    monkeypatch.setattr(run_record, "MetricsLogger", full)
    with pytest.raises(ConfigError, match=r"run.output_dir .* cannot be written: .*No space left"):
        run(file, tmp_path / "out")
    assert closed
