"""All servers of a run: who is up, who may work, what is said of the rest, and what follows from the endpoints."""

import asyncio

import pytest
from helpers.fake_fleet import FakeEngine

from megatron_laser.rollout.client.errors import ServerFault, ServerGone, ServersLost
from megatron_laser.rollout.client.fleet import Fleet
from megatron_laser.rollout.client.health import (
    Answered,
    DrainBegan,
    Limits,
    Missed,
    State,
    UpdateBegan,
    UpdateDone,
)
from megatron_laser.rollout.endpoints import EndpointsError, ServerEndpoint

LIMITS = Limits(start=60.0, update=60.0, silence=30.0)


class Endpoints:
    """What `serve` publishes; `error`: it cannot be read."""

    def __init__(self, *urls):
        self.found = [ServerEndpoint(url) for url in urls]
        self.error = None

    def __call__(self):
        if self.error is not None:
            raise self.error
        return self.found


def fleet_of(*urls, **settings):
    source = Endpoints(*urls)
    return Fleet(source, None, limits=LIMITS, **settings), source


def states(fleet):
    return {member.url: member.health.state for member in fleet.members}


def test_only_healthy_servers_with_the_wanted_weights_take_work():
    engine = FakeEngine(4)
    fleet = engine.fleet
    assert len(fleet.available()) == 4  # no weights have been sent: any will do
    fleet.wanted = "run-1"
    assert fleet.available() == [] and len(fleet.updatable()) == 4
    for number in (0, 1, 2):
        fleet.handle(engine.member(number), UpdateBegan())
    assert len(fleet.updatable()) == 1
    fleet.handle(engine.member(0), UpdateDone("run-1"))
    fleet.handle(engine.member(1), UpdateDone("run-0"))
    assert [member.url for member in fleet.available()] == ["http://s0"]
    fleet.handle(engine.member(0), DrainBegan())
    assert fleet.available() == []


def test_what_is_said_of_a_fleet_names_every_server_its_state_and_why():
    engine = FakeEngine(3)
    fleet = engine.fleet
    fleet.wanted = "run-1"
    fleet.handle(engine.member(1), Missed("no answer to /v1/loads within 10 s"))
    for _ in range(3):
        fleet.handle(engine.member(2), Missed("refused", refused=True))
    first, second, third = fleet.describe().split("; ")
    assert first == "http://s0 healthy for 0 s, holds weights 'default' instead of 'run-1'"
    assert second == "http://s1 suspect for 0 s (no answer to /v1/loads within 10 s)"
    assert third == "http://s2 dead for 0 s (nobody listens any more (refused))"
    assert fleet_of()[0].describe() == "no server is known"


def test_a_server_that_starts_says_what_it_waits_for():
    fleet, _ = fleet_of("http://a")
    fleet.handle(fleet.members[0], Missed("server http://a, probe: Connect call failed", refused=True))
    assert fleet.describe() == "http://a starting for 0 s (server http://a, probe: Connect call failed)"
    fleet.handle(fleet.members[0], Answered("default"))
    assert fleet.describe() == "http://a healthy for 0 s"


def test_servers_come_go_and_get_new_processes_as_the_endpoints_say():
    async def main():
        fleet, source = fleet_of("http://a", "http://b")
        a, b = fleet.members
        for member in (a, b):
            fleet.handle(member, Answered("run-1"))
        requests = [asyncio.create_task(asyncio.sleep(60)) for _ in range(2)]
        for member, request in zip((a, b), requests):
            member.running.add(request)
        source.found = [ServerEndpoint("http://a", start=2), ServerEndpoint("http://c")]
        fleet._look()
        assert states(fleet) == {"http://a": State.RESTARTING, "http://c": State.STARTING}
        assert a in fleet.members  # the same server, whose old process's requests have ended; b's, too
        await asyncio.wait(requests, timeout=10)
        assert all(request.cancelled() for request in requests)
        fleet._look()  # nothing new
        assert states(fleet) == {"http://a": State.RESTARTING, "http://c": State.STARTING}
        fleet.handle(a, Answered("default"))
        assert not a.health.takes_work("run-1") and a.health.can_be_updated()

    asyncio.run(main())


def test_endpoints_that_cannot_be_read_change_nothing_and_are_told_once(caplog):
    fleet, source = fleet_of("http://a")
    source.error = EndpointsError(["endpoints.json cannot be read: stale file handle"])
    for _ in range(3):
        fleet._look()
    assert len(fleet.members) == 1 and caplog.text.count("stale file handle") == 1


def test_a_server_that_dies_ends_its_requests_and_a_suspect_one_does_not():
    async def main():
        fleet, _ = fleet_of("http://a")
        (member,) = fleet.members
        fleet.handle(member, Answered("run-1"))
        request = asyncio.create_task(asyncio.sleep(60))
        member.running.add(request)
        fleet.failed(member, ServerFault("http://a", "generation", "500"))
        await asyncio.sleep(0)
        assert member.health.state is State.SUSPECT and not request.cancelled()
        for _ in range(3):
            fleet.handle(member, Missed("refused", refused=True))
        await asyncio.wait([request], timeout=10)
        assert member.health.state is State.DEAD and request.cancelled()

    asyncio.run(main())


def test_waiting_for_servers_ends_at_its_deadline_with_each_servers_reason():
    now = [0.0]

    async def main():
        fleet, _ = fleet_of("http://a", "http://b", clock=lambda: now[0])
        fleet.handle(fleet.members[0], Answered("default"))
        fleet.handle(fleet.members[1], Missed("it loads"))
        assert await fleet.wait_until_up(1, 5.0) == [fleet.members[0]]
        now[0] = 3.0
        waiting = asyncio.create_task(fleet.wait_until_up(2, 5.0))
        await asyncio.sleep(0)
        now[0] = 9.0
        fleet.handle(fleet.members[1], Missed("it loads"))  # whoever waits looks again
        with pytest.raises(ServersLost) as error:
            await waiting
        assert str(error.value) == (
            "1 of 2 servers answered within 5 s: http://a healthy for 9 s; http://b starting for 9 s (it loads)"
        )

    asyncio.run(main())


def test_a_probe_sees_a_scheduler_that_hangs_behind_an_open_port_and_what_is_no_sglang_server():
    engine = FakeEngine(1)
    member, server = engine.member(0), engine.servers[0]

    def probe():
        engine.run(engine.fleet.probe(member), 10.0, "probe")
        return member.health.state

    first = engine.log[:]
    assert probe() is State.HEALTHY and member.probe_error is None
    paths = [path for _, path in engine.log[len(first) :]]
    assert paths[0] != "/model_info" and paths[-1] == "/model_info"  # one of them goes through the scheduler
    hang = ServerGone("http://s0", "probe", "broken")
    server.fails[paths[0]] = hang
    assert probe() is State.SUSPECT and member.probe_error is hang
    server.fails.clear()
    assert probe() is State.HEALTHY and member.probe_error is None
    for answer in ({}, [], None, {"model_path": "m"}):
        server.fails["/model_info"] = answer
        assert probe() is State.SUSPECT
        assert "/model_info names no weight_version" in member.health.reason
