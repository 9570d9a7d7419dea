"""A server that came back waits for weights, but never for those that it has been given already, nor for itself."""

import asyncio
from types import SimpleNamespace

import pytest
from helpers.faulty_server import FaultyServer
from helpers.runs import run_config

from megatron_laser.rollout.servers.probe import Answer, Prober
from megatron_laser.rollout.servers.server import ManagedServer


@pytest.mark.parametrize(("version", "held"), [("default", True), ("run-3", False)])
def test_a_server_is_held_only_while_it_has_the_first_weights(version, held):
    """run-3: the run has updated and continued it between the question for its version and the pause."""
    server = FaultyServer()
    server.version = version

    async def hold():
        prober = Prober(None)
        try:
            return await prober.hold(server.url, "default")
        finally:
            await prober.close()

    try:
        assert asyncio.run(hold()) is held
        assert server.paused is held
    finally:
        server.stop()


class Scripted:
    """A prober whose server answers one tick after another: (its scheduler answers, it takes requests)."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.held = 0

    async def ask(self, url, deadline):
        return Answer("0.5.23", "default") if self.answers[0][0] else None

    async def takes_requests(self, url):
        return self.answers.pop(0)[1]

    async def freeze_gc(self, url):
        return True

    async def hold(self, url, initial):
        self.held += 1
        return True


def watched(tmp_path, *answers, **rollout):
    """The states of a server after each answer, and how often it was held by then; answers come every two minutes."""
    sglang = {"hang_deadline": 100.0, "options": rollout.pop("options", {})}
    config = run_config(
        tmp_path, tmp_path / "model", rollout={"engine": "sglang", "sglang": sglang, **rollout}
    )
    plan = SimpleNamespace(config=config, ports=[1], url=lambda port: "http://s", folder=tmp_path)
    server, prober, seen = ManagedServer(plan, 0), Scripted(*answers), []
    server.child = SimpleNamespace(
        pid=1, ended=lambda: None, kill=lambda: None, tail=lambda count: [], last_line=lambda: ""
    )
    server.slot.started(0.0)

    async def look():
        while prober.answers and server.child is not None:
            for _ in ("asks", "hears"):
                await server.tick(prober, 60.0 * len(seen), fleet_was_updated=True)
                await asyncio.sleep(0.01)
                seen.append((server.slot.state, prober.held))

    asyncio.run(look())
    return seen[1::2]


def test_a_server_is_not_held_in_its_own_warm_up(tmp_path):
    answers = (True, False), (True, False), (True, True), (True, True)
    with_warm_up = watched(tmp_path, *answers, options={"skip_server_warmup": False})
    assert with_warm_up == [("starting", 0), ("starting", 0), ("held", 1), ("held", 1)]


def test_a_server_that_loads_weights_from_disk_is_not_taken_for_one_that_hangs(tmp_path):
    loading = (True, True), (False, False), (False, False), (False, False), (False, False), (True, True)
    states = watched(tmp_path, *loading, weight_sync="disk", sync_deadline=600.0)
    assert {state for state, _ in states} == {"held"}
    assert "restarting" in {
        state for state, _ in watched(tmp_path, *loading)
    }  # others take a bucket at a time
    hung = [(True, True)] + [(False, True)] * 5
    assert "restarting" in {
        state for state, _ in watched(tmp_path, *hung, weight_sync="disk", sync_deadline=600.0)
    }
