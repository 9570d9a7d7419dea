"""Saving and resuming on one process: exact, in the background as well, and harmless when it fails."""

import errno
import json
import logging
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from helpers.models import save_tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.model import platform
from megatron_laser.trainer import optimizer_state
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint import manager, torch_dist
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.trainer import Trainer

STATE = {"cursor": {"epoch": 0, "offset": 4}}
GROUPS = [
    [Response(9, True), Response(12, False), Response(5, False)],
    [Response(7, False), Response(3, True)],
]


class Run:
    """A trainer and its checkpoints in `folder`, as far as a loop would have them."""

    def __init__(self, runtime, folder, *overrides, model="model"):
        self.config = run_config(folder, folder / model, "checkpoint.every=1", *overrides)
        self.trainer = Trainer(self.config, runtime, score_token_id=SCORE_TOKEN)
        self.checkpoints = CheckpointManager(self.config, runtime, self.trainer.policy)
        self.root = folder / "run" / "checkpoints"

    def train(self, *steps):
        for step in steps:
            metrics = self.trainer.train_step(rollout_batch(GROUPS, seed=step), step).metrics
        return metrics | {name: tensor.clone() for name, tensor in self.trainer.weight_stream()}

    def save(self, step):
        self.checkpoints.save(step, STATE)
        return self.checkpoints.wait()

    def published(self):
        return [step for step, _ in folders.published(self.root)]


@pytest.fixture
def folder(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen2")
    return tmp_path


@pytest.fixture
def start(single_process, folder):
    return lambda *overrides, **other: Run(single_process, folder, *overrides, **other)


def assert_identical(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_ranks_wait_for_files_by_a_deadline_of_their_own(start, monkeypatch, asynchronous):
    """A slow file system is no reason to raise run.deadline, for which ranks wait for each other in a step."""
    made, used = [], set()
    new_group, gather = dist.new_group, dist.all_gather_object

    def noted(*arguments, **settings):
        made.append((new_group(*arguments, **settings), settings["timeout"]))
        return made[-1][0]

    def spied(objects, own, group=None):
        used.add(group)
        return gather(objects, own, group=group)

    monkeypatch.setattr(dist, "new_group", noted)
    run = start(f"checkpoint.asynchronous={asynchronous}", "checkpoint.deadline=1234")
    ((group, timeout),) = made
    assert timeout.total_seconds() == 1234
    run.train(1)
    monkeypatch.setattr(dist, "all_gather_object", spied)
    assert run.save(1)
    assert run.checkpoints.resume() is not None
    assert used == {group}


SETTINGS = {
    "fp32": (),
    "bf16": ("model.dtype=bfloat16",),
    "distributed": ("optimizer.distributed=true",),
    "cosine with warm-up": ("optimizer.schedule=cosine", "optimizer.warmup_steps=2", "run.steps=5"),
    "in the background": ("checkpoint.asynchronous=true",),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_step_after_resuming_is_bitwise_the_step_that_would_have_followed(start, settings):
    run = start(*settings)
    run.train(1, 2)
    assert run.save(2)
    expected = run.train(3)
    resumed = start(*settings)
    state = resumed.checkpoints.resume()
    assert (state["step"], state["run"]) == (2, STATE)
    assert_identical(resumed.train(3), expected)


def test_no_two_parameters_share_a_step_count(start):
    for overrides in ((), ("optimizer.distributed=true",)):
        run = start(*overrides)
        run.train(1, 2)
        assert run.save(2)
        resumed = start(*overrides)
        resumed.checkpoints.resume()
        resumed.train(3)
        states = [
            state
            for inner in resumed.trainer.policy.optimizer.chained_optimizers
            for state in inner.optimizer.state.values()
        ]
        assert len(states) > 20
        assert len({state["step"].data_ptr() for state in states}) == len(states)
        assert {float(state["step"]) for state in states} == {3.0}
        assert optimizer_state.get_step(resumed.trainer.policy.optimizer) == 3


def test_more_steps_than_the_first_run_had_follow_the_new_schedule(start):
    run = start("optimizer.schedule=linear", "run.steps=4", "optimizer.lr=1e-3")
    run.train(1, 2)
    assert run.save(2)
    resumed = start("optimizer.schedule=linear", "run.steps=8", "optimizer.lr=1e-3")
    resumed.checkpoints.resume()
    assert resumed.train(3)["lr"] == pytest.approx(1e-3 * (1 - 3 / 8))


def test_a_background_save_writes_the_same_files_while_training_goes_on(start, monkeypatch):
    run = start()
    run.train(1, 2)
    assert run.save(2)
    waiting = folders.digests(run.root / "step_00000002", "")
    background = start("checkpoint.asynchronous=true", "checkpoint.folder=" + str(run.root.parent / "other"))
    background.train(1, 2)
    go_on, write = threading.Event(), torch_dist.write_sharded

    def slow(*arguments):
        assert go_on.wait(60)
        write(*arguments)

    monkeypatch.setattr(torch_dist, "write_sharded", slow)
    background.checkpoints.save(2, STATE)
    background.train(3)  # not blocked by the save, and not seen by it
    go_on.set()
    assert background.checkpoints.wait()
    written = folders.digests(run.root.parent / "other" / "step_00000002", "")
    # torch writes a random id into .metadata.
    for files in (waiting, written):
        files.pop(".metadata")
        files.pop("manifest.json")
    assert written == waiting


def test_only_as_many_checkpoints_as_asked_for_are_kept(start):
    run = start("checkpoint.keep_last=1", "checkpoint.keep_every=2", "run.steps=9")
    run.train(1)
    for step in range(1, 6):
        assert run.save(step)
    assert run.published() == [2, 4, 5]


def test_the_writing_thread_uses_the_device_of_its_process(monkeypatch):
    bound = []
    monkeypatch.setattr(platform, "device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(
        platform, "use_device", lambda device: bound.append((threading.current_thread().name, device))
    )
    writer = manager._Writer(lambda: bound.append("written"))
    writer.start()
    assert writer.finish() is None
    assert bound == [("checkpoint-writer", torch.device("cuda", 3)), "written"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_written_state_leaves_host_memory_at_once(fails):
    def writer_of(state):
        def write():
            if fails:
                raise OSError(f"no room for {len(state)} numbers") from ValueError()

        return manager._Writer(write)

    state = torch.ones(5)
    gone = weakref.ref(state)
    writer = writer_of(state)
    del state
    writer.start()
    error = writer.finish()
    assert gone() is None
    assert str(error) == ("OSError: no room for 5 numbers" if fails else "None")


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_leaves_the_last_checkpoint_valid_and_the_run_alive(
    start, monkeypatch, caplog, asynchronous
):
    run = start(f"checkpoint.asynchronous={asynchronous}")
    run.train(1)
    assert run.save(1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(torch_dist, "write_sharded", full)
        run.train(2)
        assert not run.save(2)
    assert (
        "the checkpoint was not saved, the last published one stays valid: OSError: [Errno 28]" in caplog.text
    )
    assert not run.checkpoints.wait()
    assert "No space left" in run.checkpoints.trouble
    assert [path.name for path in run.root.iterdir()] == ["step_00000001"]
    run.train(3)
    assert run.save(3)
    assert run.checkpoints.trouble == ""
    resumed = start()
    resumed.checkpoints.resume()
    assert_identical(resumed.train(4), run.train(4))
    assert run.published() == [1, 3]


def test_a_disk_that_fills_up_inside_torchs_writer_is_told_in_one_line(start, monkeypatch, caplog):
    run = start()
    run.train(1)

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", full)
    assert not run.save(1)
    assert run.checkpoints.trouble == "rank 0: OSError: [Errno 28] No space left on device"
    assert run.published() == []


def test_a_full_disk_is_told_by_its_free_space_where_torchs_writer_does_not_name_it(start, monkeypatch):
    run = start()
    run.train(1)

    def full(*arguments, **settings):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", full)
    assert not run.save(1)
    assert f"iostream error ({run.root}: " in run.checkpoints.trouble
    assert run.checkpoints.trouble.endswith(" GiB free)")


def test_a_folder_that_cannot_be_written_fails_the_save_and_not_the_run(start, folder):
    run = start()
    run.train(1)
    run.root.parent.mkdir(parents=True, exist_ok=True)
    run.root.write_text("a file where the folder should be")
    assert not run.save(1)
    assert "checkpoints" in run.checkpoints.trouble


def test_resuming_without_a_checkpoint_begins_anew(start):
    assert start().checkpoints.resume() is None


def refused(run):
    with pytest.raises(CheckpointError) as error:
        run.checkpoints.resume()
    return str(error.value)


@pytest.fixture
def saved(start):
    run = start()
    run.train(1)
    assert run.save(1)
    return run.root / "step_00000001"


def test_a_checkpoint_of_another_model_is_refused_with_both_sizes(start, folder, saved):
    save_tiny_model(folder / "wider", "qwen2", intermediate_size=128)
    assert refused(start(model="wider")) == (
        f"checkpoint {saved} is of another model: intermediate_size 96 there, 128 here; choose another "
        "run.output_dir or the model it was trained from"
    )


def test_a_damaged_shard_is_refused_by_name(start, saved):
    file = saved / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "__0_0.distcp is damaged" in refused(start())


def test_without_verification_a_shard_that_cannot_be_read_is_still_one_line(start, saved):
    file = saved / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    message = refused(start("checkpoint.verify=false"))
    assert message.startswith(f"checkpoint {saved} cannot be loaded: ")
    assert message.endswith("checkpoint.verify=true names a damaged file")
    assert "\n" not in message


def test_a_checkpoint_beyond_the_last_step_is_refused(start):
    run = start()
    run.train(1, 2)
    assert run.save(2)
    assert "is of step 2, beyond run.steps 1; raise run.steps" in refused(start("run.steps=1"))


def test_a_newer_format_is_refused_before_anything_is_loaded(start, saved):
    state = json.loads((saved / "state.json").read_text()) | {"format_version": 99}
    (saved / "state.json").write_text(json.dumps(state))
    assert "has format 99" in refused(start())
