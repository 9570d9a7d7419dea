"""Weights through a folder: complete, checked, deleted when old, and taken by servers that come late or back."""

import json
from pathlib import Path

import pytest
import torch
from helpers.fake_fleet import FakeEngine
from safetensors.torch import load_file
from test_weight_update import GIVE, ORDER, WEIGHTS, digest_of

from megatron_laser.rollout.client.errors import (
    ServerGone,
    ServerMismatch,
)
from megatron_laser.rollout.client.health import Answered, Restarted, State
from megatron_laser.weight_sync import sync_weights
from megatron_laser.weight_sync import update as steps
from megatron_laser.weight_sync.disk import DiskTransport
from megatron_laser.weight_sync.update import SyncFailed


@pytest.fixture(autouse=True)
def no_long_flush(monkeypatch):
    monkeypatch.setattr(steps, "_FLUSH_SECONDS", 0.05)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "torch_dtype": "bfloat16"}))
    return folder


def transport(tmp_path, source, *, always_verify=False):
    return DiskTransport(
        tmp_path / "weights",
        source=source,
        dtype=torch.float32,
        seconds=30.0,
        always_verify=always_verify,
    )


def test_servers_that_come_late_say_on_what_they_compute_before_a_digest_is_made(tmp_path, source):
    engine = SyncingEngine(2, transport(tmp_path, source))
    for member in engine.fleet.members:
        member.device = None
    assert sync_weights(iter(WEIGHTS), engine, 0) is None
    assert "/weights_checker" in engine.calls(1)


class SyncingEngine(FakeEngine):
    """With the part of `SglangEngine.update_weights`."""

    def __init__(self, count, transport):
        super().__init__(count)
        self.transport, self.version, self.loaded = transport, 0, []
        sums = digest_of(WEIGHTS).sums()
        for server in self.servers:
            server.loads = self.load
            server.sums = sums

    def load(self, folder):
        tensors = load_file(f"{folder}/model.safetensors")
        assert json.loads(Path(folder, "config.json").read_text())["dtype"] == "float32"
        assert {name: value.tolist() for name, value in tensors.items()} == {
            n: t.tolist() for n, t in WEIGHTS
        }
        self.loaded.append(folder)

    def update_weights(self, weights, version):
        self.transport.send(self, weights, version, self.label(version))
        self.version = version
        self.fleet.wanted = self.label(version)


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "weights").iterdir())


def test_every_server_loads_a_complete_folder_and_older_ones_are_deleted(tmp_path, source):
    engine = SyncingEngine(2, transport(tmp_path, source))
    (tmp_path / "weights" / "weights-killed-7.partial").mkdir(parents=True)
    (tmp_path / "weights" / "keep me").mkdir()
    for version in (0, 1, 2):
        assert sync_weights(iter(WEIGHTS), engine, version) is None
        assert folders(tmp_path) == ["keep me", f"weights-run-{version}"]
    assert engine.loaded == [str(tmp_path / "weights" / f"weights-run-{v}") for v in (0, 0, 1, 1, 2, 2)]
    engine.transport.close()
    engine.transport.close()
    assert folders(tmp_path) == ["keep me"]


def test_checksums_are_compared_after_the_first_update_and_on_demand_after_each(tmp_path, source):
    for always, expected in ((False, 2), (True, 4)):
        engine = SyncingEngine(1, transport(tmp_path, source, always_verify=always))
        for version in (0, 0, 1, 2):  # the first weights are those that servers have loaded
            assert sync_weights(iter(WEIGHTS), engine, version) is None
        assert engine.calls(0).count("/weights_checker") == expected


def test_a_failed_sync_says_why_runs_the_stream_to_its_end_and_keeps_the_folder_that_others_hold(
    tmp_path, source
):
    engine = SyncingEngine(1, transport(tmp_path, source))
    assert sync_weights(iter(WEIGHTS), engine, 0) is None
    engine.servers[0].fails["/pause_generation"] = ServerGone("http://s0", "pausing generation", "reset")
    seen = []

    def stream():
        for item in WEIGHTS:
            yield item
            seen.append(item[0])

    trouble = sync_weights(stream(), engine, 1)
    assert "http://s0, pausing generation: reset" in trouble
    assert seen == ["a.weight", "b.bias"] and engine.version == 0
    assert folders(tmp_path) == ["weights-run-0", "weights-run-1"]
    engine.servers[0].fails.clear()
    engine.fleet.handle(engine.member(0), Answered("run-0"))
    assert sync_weights(iter(WEIGHTS), engine, 1) is None
    assert folders(tmp_path) == ["weights-run-1"]


def test_what_a_failed_sync_has_left_is_deleted_at_the_end(tmp_path, source):
    engine = SyncingEngine(1, transport(tmp_path, source))
    engine.servers[0].fails["/pause_generation"] = ServerGone("http://s0", "pausing generation", "reset")
    assert sync_weights(iter(WEIGHTS), engine, 0)
    engine.transport.close()
    assert folders(tmp_path) == []


def test_other_ranks_run_the_stream_and_an_engine_with_another_version_is_an_error():
    seen = []
    assert sync_weights((seen.append(item) or item for item in WEIGHTS), None, 3) is None
    assert len(seen) == 2
    engine = FakeEngine(1)
    engine.version, engine.update_weights = 0, lambda weights, version: list(weights)
    with pytest.raises(RuntimeError, match="reports version 0 after an update to 3"):
        sync_weights(iter(WEIGHTS), engine, 3)


def test_a_failure_that_another_attempt_would_not_mend_ends_the_run():
    engine = FakeEngine(1)

    def fail(weights, version):
        raise SyncFailed("for good", retry=False)

    engine.update_weights = fail
    with pytest.raises(SyncFailed, match="for good"):
        sync_weights(iter(WEIGHTS), engine, 1)


def restart(engine, number):
    """Its server has a new process, which holds the weights of the model folder."""
    engine.servers[number].version = "default"
    engine.fleet.handle(engine.member(number), Restarted())


def probe(engine, number):
    engine.run(engine.fleet.probe(engine.member(number)), 10.0, "probe")


def test_a_restarted_server_catches_up_from_the_folder_before_it_gets_work(tmp_path, source):
    engine = SyncingEngine(2, transport(tmp_path, source))
    assert sync_weights(iter(WEIGHTS), engine, 4) is None
    restart(engine, 1)
    engine.log.clear()
    probe(engine, 1)
    assert engine.calls(1)[2:] == ORDER and engine.calls(0) == []  # after the two calls of a probe
    assert engine.member(1).health.takes_work("run-4") and engine.servers[1].version == "run-4"
    engine.log.clear()
    probe(engine, 1)
    assert len(engine.calls(1)) == 2  # once is enough


def test_a_server_that_came_late_says_who_it_is_before_it_catches_up(tmp_path, source):
    engine = SyncingEngine(2, transport(tmp_path, source))
    assert sync_weights(iter(WEIGHTS), engine, 4) is None
    restart(engine, 1)
    late, asked = engine.member(1), []
    late.device = None

    async def another_model(member):
        asked.append(member.url)
        raise ServerMismatch(member.url, "identifying the server", "it serves another model")

    async def fits(member):
        member.device = "cpu"

    engine.fleet.identify = another_model
    engine.log.clear()
    for _ in range(3):
        probe(engine, 1)
    assert asked == ["http://s1"] and GIVE not in engine.calls(1)  # asked once: it will not change
    assert not late.health.takes_work("run-4")
    engine.fleet.identify = fits
    late.unfit = False  # as with a new process
    probe(engine, 1)
    assert late.health.takes_work("run-4") and engine.servers[1].version == "run-4"


def test_a_server_that_does_not_catch_up_gets_no_work_and_stays_paused(tmp_path, source):
    engine = SyncingEngine(2, transport(tmp_path, source))
    assert sync_weights(iter(WEIGHTS), engine, 4) is None
    restart(engine, 1)
    engine.servers[1].fails[GIVE] = {"success": True}  # and nothing changes
    engine.log.clear()
    probe(engine, 1)
    health = engine.member(1).health
    assert not health.takes_work("run-4") and health.state is State.SUSPECT
    assert "holds weights 'default' after an update to 'run-4'" in health.reason
    assert engine.servers[1].paused
