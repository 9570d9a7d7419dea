"""The group with the servers: a broadcast that never ends is given up, and groups of an earlier life are left."""

import threading
import time
from typing import ClassVar

import pytest
import torch
from helpers.fake_fleet import FakeEngine

from megatron_laser.rollout.client.errors import ServerRefused, ServerTimeout
from megatron_laser.rollout.client.health import Restarted, State
from megatron_laser.weight_sync import distributed
from megatron_laser.weight_sync.distributed import DistributedTransport
from megatron_laser.weight_sync.group import Broadcast, UpdateGroup
from megatron_laser.weight_sync.peers import Peers
from megatron_laser.weight_sync.update import SyncFailed

WEIGHTS = [("a", torch.ones(4)), ("b", torch.ones(4))]


class Work:
    def __init__(self, completed=True):
        self.completed = completed

    def is_completed(self):
        return self.completed

    def wait(self):
        assert self.completed


class Group:
    """In the place of `UpdateGroup`. send: what a broadcast does."""

    made: ClassVar[list] = []

    def __init__(self, update, name, *, backend, address, timeout):
        self.name, self.backend, self.aborted = name, backend, False
        self.members = {member: (member.start, member.health.deaths) for member in update.members}
        self.made.append(self)

    fits, is_whole = UpdateGroup.fits, UpdateGroup.is_whole

    def leave(self):
        self.aborted = True

    def broadcast(self, tensor):
        return self.send(tensor)


@pytest.fixture
def groups(monkeypatch):
    monkeypatch.setattr(distributed, "UpdateGroup", Group)
    monkeypatch.setattr(Group, "made", [])
    monkeypatch.setattr(Group, "send", lambda self, tensor: Work(), raising=False)
    return Group


def transport(seconds=30.0, past_groups=None):
    return DistributedTransport(
        peers=Peers(torch_version=torch.__version__, nccl_version=None, environment={}),
        dtype=torch.float32,
        bucket_bytes=16,
        seconds=seconds,
        address="127.0.0.1",
        flattened=True,
        always_verify=False,
        past_groups=past_groups,
    )


def send(engine, moved, version=1):
    moved._checks._versions = {-1, -2}  # what is compared afterwards is tested elsewhere
    moved.send(engine, iter(WEIGHTS), version, engine.label(version))


def test_connecting_that_never_ends_is_given_up_at_the_deadline_with_servers_and_phase(groups, monkeypatch):
    """NCCL connects in the first collective of a group, which blocks its caller and has no deadline."""
    forever = threading.Event()
    monkeypatch.setattr(groups, "send", lambda self, tensor: forever.wait())
    engine, began = FakeEngine(2), time.monotonic()
    for server in engine.servers:  # they wait in the collective, too
        server.fails["/update_weights_from_distributed"] = {"success": True}
    try:
        with pytest.raises(SyncFailed) as error:
            send(engine, transport(seconds=0.3))
    finally:
        forever.set()
    assert 0.3 <= time.monotonic() - began < 5
    message = str(error.value)
    assert "http://s0, http://s1 not done within rollout.sync_deadline 0.3 s: connecting" in message
    assert error.value.retry and groups.made[0].aborted
    assert {member.health.state for member in engine.fleet.members} == {State.SUSPECT}


def test_a_broadcast_that_hangs_on_the_device_is_given_up_too(groups, monkeypatch):
    monkeypatch.setattr(groups, "send", lambda self, tensor: Work(completed=False))
    with pytest.raises(SyncFailed, match=r"not done within .* 0\.2 s: receiving weights") as error:
        send(FakeEngine(1), transport(seconds=0.2))
    assert error.value.retry and groups.made[0].aborted


def test_a_broadcast_that_fails_names_the_servers(groups, monkeypatch):
    def fail(self, tensor):
        raise RuntimeError("NCCL error: remote process exited")

    monkeypatch.setattr(groups, "send", fail)
    with pytest.raises(SyncFailed, match=r"the broadcast to http://s0 failed: NCCL error: remote") as error:
        send(FakeEngine(1), transport())
    assert error.value.retry and groups.made[0].aborted


def test_a_broadcast_is_done_when_all_its_tensors_have_arrived():
    works = [Work(), Work(completed=False)]
    broadcast = Broadcast(lambda tensor: works[int(tensor)], [torch.tensor(0), torch.tensor(1)])
    while not broadcast.issued:
        time.sleep(0.001)
    assert not broadcast.done()
    works[1].completed = True
    assert broadcast.done()


# groups that servers still hold


def test_a_restarted_trainer_has_the_groups_of_its_earlier_life_left_once(groups, tmp_path):
    file = tmp_path / "deep" / ".weight_groups"
    first, second = FakeEngine(2), FakeEngine(2)
    first.session, second.session = "before", "after"
    send(first, transport(past_groups=file))  # and it is killed
    moved = transport(past_groups=file)
    for server in second.servers:
        server.fails["/destroy_weights_update_group"] = ServerRefused(server.url, "x", "no such group")
    second.servers[1].fails.clear()
    send(second, moved)
    send(second, moved, version=2)
    assert [server.left for server in second.servers] == [[], ["laser-before-1"]]
    third = FakeEngine(1)
    third.session = "third"
    send(third, transport(past_groups=file))
    assert third.servers[0].left == ["laser-after-1"]


def test_a_server_that_hangs_in_leaving_is_dropped_and_not_asked_again(groups, tmp_path):
    file = tmp_path / ".weight_groups"
    file.write_text('["laser-old-1"]')
    engine = FakeEngine(2)
    hangs = ServerTimeout("http://s1", "leaving an old weight group", "no answer")
    engine.servers[1].fails["/destroy_weights_update_group"] = hangs
    send(engine, transport(past_groups=file))
    assert engine.servers[0].left == ["laser-old-1"] and engine.member(1).health.state is State.SUSPECT
    assert "laser-old-1" not in file.read_text()
    assert [member.url for member in groups.made[0].members] == ["http://s0"]


def test_a_group_is_left_for_a_larger_one_but_not_when_a_peer_of_it_is_gone(groups):
    engine, moved = FakeEngine(3), transport()
    late = engine.fleet._members.pop("http://s2")
    send(engine, moved)
    engine.fleet._members["http://s2"] = late
    send(engine, moved, 2)
    assert [server.left for server in engine.servers] == [["laser-run-1"]] * 3
    engine.fleet.handle(late, Restarted())
    late.start += 1
    engine.run(engine.fleet.probe(late), 5.0, "probe")
    send(engine, moved, 3)
    assert len(groups.made) == 3 and engine.servers[0].left == ["laser-run-1"]


def test_a_file_that_is_none_or_cannot_be_written_does_not_stop_a_sync(groups, tmp_path, caplog):
    (tmp_path / "file").write_text("not json")
    send(FakeEngine(1), transport(past_groups=tmp_path / "file"))
    send(FakeEngine(1), transport(past_groups=tmp_path / "file" / "below"))
    assert "cannot be read" in caplog.text and "cannot be written" in caplog.text
