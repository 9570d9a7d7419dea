"""An update of several servers at once: its order, what happens when some or all fail a step, how lies are found."""

import itertools

import pytest
import torch
from helpers.fake_fleet import FakeEngine

from megatron_laser.rollout.client.errors import (
    ServerFault,
    ServerGone,
    ServerRefused,
    ServerTimeout,
)
from megatron_laser.rollout.client.health import Answered, State
from megatron_laser.weight_sync import update as steps
from megatron_laser.weight_sync.checksums import Checks, StreamDigest
from megatron_laser.weight_sync.update import SyncFailed, Update

GIVE = "/update_weights_from_disk"
STEPS = ["/pause_generation", "/flush_cache", GIVE, "/model_info", "/continue_generation"]
ORDER = ["/continue_generation", *STEPS]  # the first for a server that somebody else has paused
WEIGHTS = [("a.weight", torch.arange(6.0).reshape(2, 3)), ("b.bias", torch.ones(2))]


@pytest.fixture(autouse=True)
def no_long_flush(monkeypatch):
    monkeypatch.setattr(steps, "_FLUSH_SECONDS", 0.05)


def update(engine, version=1, *, check=None, checks=None):
    """As a transport does it."""
    made = Update(engine, engine.label(version), seconds=30.0)
    with made.paused():
        body = {"model_path": "folder", "weight_version": made.label}
        made.post_all(GIVE, body, phase="giving")
        if check is not None:
            (checks or Checks(always=True)).verify(made, check, version)
    return made


def test_the_order_is_pause_flush_give_check_continue_on_every_server():
    engine = FakeEngine(3)
    update(engine)
    assert [engine.calls(number) for number in range(3)] == [ORDER] * 3
    # and no server is given weights before all of them have paused
    paths = [path for _, path in engine.log]
    assert paths.index(GIVE) == 9 and "/flush_cache" not in paths[9:]
    assert paths[9:] == [path for path in ORDER[3:] for _ in range(3)]
    assert all(member.health.takes_work("run-1") for member in engine.fleet.members)
    assert not any(server.paused for server in engine.servers)


def test_requests_that_run_are_aborted_by_the_pause_so_that_the_flush_is_not_refused():
    engine = FakeEngine(1)
    engine.servers[0].running = True
    update(engine)
    assert engine.servers[0].version == "run-1"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "error",
    [
        ServerFault("http://s1", "step", "it answered 500"),
        ServerGone("http://s1", "step", "reset"),
        ServerTimeout("http://s1", "step", "no answer"),
        ServerRefused("http://s1", "step", "no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_server_that_fails_a_step_is_left_out_and_the_others_go_on(step, error):
    engine = FakeEngine(3)
    engine.servers[1].fails[step] = error
    made = update(engine)
    assert [member.url for member in made.members] == ["http://s0", "http://s2"]
    assert made.failures == [str(error)]
    failed = engine.member(1)
    assert failed.health.state is State.SUSPECT and failed.health.reason == str(error)
    calls = [path for path, _ in itertools.groupby(engine.calls(1))]  # a flush is tried several times
    assert calls == ORDER[: STEPS.index(step) + 2]  # nothing more is asked of it
    for number in (0, 2):
        assert engine.calls(number) == ORDER and engine.member(number).health.takes_work("run-1")
    # Whatever it says of itself, it gets no work before another update has reached it.
    for version in ("run-1", "default"):
        engine.fleet.handle(failed, Answered(version))
        assert not failed.health.takes_work("run-1")
    engine.servers[1].fails.clear()
    update(engine, 2)
    assert [member.health.takes_work("run-2") for member in engine.fleet.members] == [True] * 3
    assert not engine.servers[1].paused


@pytest.mark.parametrize("step", STEPS)
def test_when_all_fail_a_step_the_sync_failed_and_may_be_tried_again(step):
    engine = FakeEngine(2)
    for server in engine.servers:
        server.fails[step] = ServerFault(server.url, "the step", "it answered 500")
    with pytest.raises(
        SyncFailed, match=r"weights run-1: no server took them: .*http://s0.*http://s1"
    ) as caught:
        update(engine)
    assert caught.value.retry
    assert not any(member.health.takes_work("run-1") for member in engine.fleet.members)
    for member, server in zip(engine.fleet.members, engine.servers):
        server.fails.clear()
        engine.fleet.handle(member, Answered(server.version))
    update(engine)
    assert all(member.health.takes_work("run-1") for member in engine.fleet.members)


def test_an_answer_without_success_is_a_failure():
    engine = FakeEngine(2)
    engine.servers[0].fails[GIVE] = {"success": False, "message": "shapes differ"}
    made = update(engine)
    assert made.failures == [f"server http://s0, giving: {GIVE}: shapes differ"]
    assert not engine.member(0).health.takes_work("run-1")


def test_a_server_that_keeps_its_old_weights_is_found_by_its_version():
    engine = FakeEngine(2)
    engine.servers[1].fails[GIVE] = {"success": True}  # and nothing changes
    made = update(engine)
    assert (
        "http://s1, checking the version: holds weights 'default' after an update to 'run-1'"
        in made.failures[0]
    )
    assert engine.calls(1)[-1] == "/model_info" and engine.servers[1].paused
    assert engine.servers[0].version == "run-1" and len(made.members) == 1


def test_without_any_server_that_can_be_updated_the_state_of_each_is_told():
    engine = FakeEngine(1)
    update_error = ServerFault("http://s0", "pausing generation", "broken")
    engine.servers[0].fails["/pause_generation"] = update_error
    with pytest.raises(SyncFailed):
        update(engine)
    with pytest.raises(SyncFailed, match=r"no server can be updated: http://s0 suspect .*broken") as caught:
        update(engine)
    assert caught.value.retry


def test_an_error_of_the_trainer_leaves_no_server_with_a_name_of_its_weights():
    engine = FakeEngine(2)
    with pytest.raises(OSError, match="disk is full"), Update(engine, "run-1", seconds=30.0).paused():
        raise OSError("disk is full")
    assert all(member.health.version is None for member in engine.fleet.members)
    assert {member.health.state for member in engine.fleet.members} == {State.SUSPECT}
    assert all(server.paused for server in engine.servers)


def test_no_step_is_given_more_time_than_the_update_has_left():
    engine = FakeEngine(1)
    made = Update(engine, "run-1", seconds=7.0)
    with made.paused():
        made.post_all(GIVE, {"model_path": "f", "weight_version": "run-1"}, phase="giving", seconds=500.0)
    assert set(engine.servers[0].deadlines) == set(ORDER)
    assert all(deadline <= 7.0 for deadline in engine.servers[0].deadlines.values())


# checksums ---------------------------------------------------------------------------------------------------------


def digest_of(weights, **settings):
    digest = StreamDigest(**{"on_cpu": True} | settings)
    assert list(digest.watch(weights)) == list(weights)
    return digest


def test_a_server_with_other_weights_under_the_right_name_is_found_by_checksum():
    engine, digest = FakeEngine(3), digest_of(WEIGHTS)
    for server in engine.servers:
        server.sums = digest.sums()
    stale = digest_of([("a.weight", WEIGHTS[0][1] + 1e-6), WEIGHTS[1]]).sums()
    engine.servers[1].sums = stale
    made = update(engine, check=digest)
    assert [member.url for member in made.members] == ["http://s0", "http://s2"]
    expected = f"a.weight: {stale['a.weight']} instead of {digest.sums()['a.weight']}"
    assert "its weights are not the trainer's" in made.failures[0] and expected in made.failures[0]
    assert "b.bias" not in made.failures[0]


def test_a_parameter_that_a_server_does_not_have_is_named():
    engine, digest = FakeEngine(2), digest_of(WEIGHTS)
    engine.servers[0].sums = {"a.weight": digest.sums()["a.weight"]}
    engine.servers[1].sums = digest.sums()
    made = update(engine, check=digest)
    assert "b.bias: the server has no such parameter" in made.failures[0]


@pytest.mark.parametrize(
    "answer",
    [None, {}, [], {"ranks": []}, {"ranks": [{}]}, {"success": True}, {"ranks": [{"checksums": None}]}],
)
def test_an_answer_without_checksums_is_not_taken_for_agreement(answer):
    engine, digest = FakeEngine(2), digest_of(WEIGHTS)
    engine.servers[0].fails["/weights_checker"] = answer
    engine.servers[1].sums = digest.sums()
    made = update(engine, check=digest)
    assert [member.url for member in made.members] == ["http://s1"]
    assert "http://s0, comparing checksums: its answer has no checksums" in made.failures[0]


def test_when_no_server_agrees_the_sync_failed():
    engine, digest = FakeEngine(2), digest_of(WEIGHTS)
    for server in engine.servers:
        server.sums = digest_of([("a.weight", torch.zeros(2, 3)), WEIGHTS[1]]).sums()
    with pytest.raises(SyncFailed, match="no server took them"):
        update(engine, check=digest)


def test_servers_on_gpus_are_compared_with_the_trainer_too():
    engine, digest = FakeEngine(2), digest_of(WEIGHTS, on_cpu=False)
    assert digest.sums() != digest_of(WEIGHTS).sums()
    engine.servers[0].sums = digest.sums()
    engine.servers[1].sums = digest.sums() | {"b.bias": "0" * 16}
    made = update(engine, check=digest)
    assert [member.url for member in made.members] == ["http://s0"]
    assert f"b.bias: {'0' * 16} instead of {digest.sums()['b.bias']}" in made.failures[0]


def test_servers_whose_shares_are_unknown_are_compared_with_each_other_too_and_that_is_said_once(caplog):
    checks = Checks(always=True)
    for version in (1, 2):
        engine, digest = FakeEngine(3), digest_of(WEIGHTS, sizes={2})
        for member, server in zip(engine.fleet.members, engine.servers):
            member.tensor, server.info["tp_size"] = 2, 2
            server.sums = digest.sums(2) | {"q": "same"}
        engine.servers[2].sums["q"] = "another"
        made = update(engine, version, check=digest, checks=checks)
        assert [member.url for member in made.members] == ["http://s0", "http://s1"]
        assert "http://s2" in made.failures[0] and "differ from those of http://s0" in made.failures[0]
    assert caplog.text.count("spread over their ranks is not known") == 1


# disk --------------------------------------------------------------------------------------------------------------
