"""What servers say of their load while a rollout runs: by time, within bounds, and never at the rollout's cost."""

import asyncio
import time
from contextlib import contextmanager

import pytest
from helpers.fake_fleet import FakeEngine
from helpers.faulty_server import FaultyServer, open_engine

from megatron_laser.rollout.client.errors import ServerRefused, ServerTimeout
from megatron_laser.rollout.client.health import Missed
from megatron_laser.rollout.client.load_watch import LoadWatch
from megatron_laser.rollout.engine import watched
from megatron_laser.rollout.server_load import ServerLoad, parse_load
from megatron_laser.types import SamplingParams

LOADS = "/v1/loads?include=core"


def load(running, queued=0, usage=0.0):
    return {"num_running_reqs": running, "num_waiting_reqs": queued, "token_usage": usage}


class Watched:
    """Servers in memory whose loads are asked for by a clock of the test's."""

    def __init__(self, count, **settings):
        self.engine = FakeEngine(count)
        self.now = 0.0
        self.watch = LoadWatch(self.engine.fleet, clock=lambda: self.now, **settings)

    def say(self, *loads):
        for server, said in zip(self.engine.servers, loads, strict=True):
            server.load = said

    async def until_asked(self, times):
        """`times` rounds of questions, all in all."""
        ends = time.monotonic() + 5.0
        while len([call for call in self.engine.log if call[1] == LOADS]) < times * len(self.engine.servers):
            assert time.monotonic() < ends
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)


def test_loads_count_by_the_time_that_they_hold_and_only_while_a_rollout_runs():
    async def main():
        fleet = Watched(2)
        fleet.watch.begin()
        fleet.now = 4.0
        fleet.say(load(10, 6, 0.5), load(2, 0, 0.1))
        await fleet.until_asked(1)  # holds since the beginning
        fleet.now = 10.0
        fleet.say(load(4, 0, 0.2), load(0))
        await fleet.until_asked(2)
        fleet.now = 12.0
        fleet.watch.end()  # the last holds until then
        await asyncio.sleep(0.4)
        assert len(fleet.engine.log) == 4  # two rounds, and none since
        fleet.now = 100.0
        return fleet.watch

    watch = asyncio.run(main())
    assert (watch.known_seconds, watch.busy_seconds) == (12.0, pytest.approx((12 + 4) / 2))
    found = watch.take()
    seconds = 2 * 12.0
    assert found == {
        "servers/utilisation": pytest.approx((12 + 4) / seconds),
        "servers/running_mean": pytest.approx((10 * 4 + 4 * 8 + 2 * 4) / seconds),
        "servers/queued_mean": pytest.approx(6 * 4 / seconds),
        "servers/kv_usage_mean": pytest.approx((0.5 * 4 + 0.2 * 8 + 0.1 * 4) / seconds),
    }
    assert watch.take() == {} and watch.known_seconds == 12.0


def test_a_dead_server_has_nothing_to_do_and_is_not_asked():
    async def main():
        fleet = Watched(2)
        for _ in range(3):
            fleet.engine.fleet.handle(fleet.engine.member(1), Missed("refused", refused=True))
        fleet.say(load(3), load(3))
        fleet.watch.begin()
        fleet.now = 5.0
        await asyncio.sleep(0.1)
        fleet.watch.end()
        return fleet

    fleet = asyncio.run(main())
    assert fleet.engine.calls(1) == [] and fleet.engine.calls(0) == [LOADS]
    assert fleet.watch.take()["servers/utilisation"] == 0.5


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("failure", [{}, {"loads": []}, ServerRefused("s", "load", "answered 404", 404)])
def test_a_server_that_cannot_say_is_asked_once_and_known_by_the_requests_that_are_open_on_it(
    failure, router, caplog
):
    caplog.set_level("INFO")

    async def main():
        fleet = Watched(1, router=router)
        fleet.engine.servers[0].fails[LOADS] = failure
        fleet.engine.member(0).running.add("a request")
        fleet.watch.begin()
        fleet.now = 3.0
        await asyncio.sleep(0.4)
        fleet.watch.end()
        return fleet

    fleet = asyncio.run(main())
    assert fleet.engine.calls(0) == [LOADS]
    assert caplog.text.count("does not say what it has to do") == 1
    # Behind a router nobody knows who has what.
    assert fleet.watch.take() == ({} if router else {"servers/utilisation": 1.0})


def test_a_late_answer_is_left_out_and_its_server_is_asked_again():
    async def main():
        fleet = Watched(1)
        fleet.engine.servers[0].fails[LOADS] = ServerTimeout("s", "load", "no answer within 2 s")
        fleet.watch.begin()
        await asyncio.sleep(0.1)
        assert fleet.engine.servers[0].deadlines[LOADS] <= 2.0
        fleet.engine.servers[0].fails.clear()
        fleet.say(load(7))
        fleet.now = 4.0
        await fleet.until_asked(2)
        fleet.watch.end()
        return fleet.watch.take()

    assert asyncio.run(main())["servers/running_mean"] == 7.0


def test_what_breaks_the_watch_is_said_and_breaks_nothing_else(caplog):
    async def main():
        fleet = Watched(1)
        fleet.engine.servers[0].fails[LOADS] = ZeroDivisionError("a fault")
        fleet.watch.begin()
        await asyncio.sleep(0.1)
        fleet.watch.end()
        return fleet.watch.take()

    assert asyncio.run(main()) == {}
    assert "servers are not asked for their load in this rollout any more" in caplog.text


def test_of_many_servers_each_is_asked_less_often():
    async def main():
        fleet = Watched(40)  # 50 questions a second: a round of them all every 0.8 s
        fleet.watch.begin()
        await asyncio.sleep(0.6)
        fleet.watch.end()
        return len(fleet.engine.log)

    assert asyncio.run(main()) == 40


def test_loads_of_data_parallel_ranks_are_one_servers():
    ranks = [load(3, 1, 0.25), load(5, 0, 0.75)]
    assert parse_load({"loads": ranks}) == ServerLoad(8.0, 1.0, 0.5)
    for nothing in (
        None,
        [],
        {},
        {"loads": None},
        {"loads": [7]},
        {"loads": [{**load(3), "token_usage": "x"}]},
    ):
        assert parse_load(nothing) is None


@contextmanager
def engine_over(server):
    engine = open_engine(server)
    try:
        yield engine
    finally:
        engine.close()
        server.stop()


def test_an_engine_says_how_busy_its_servers_were_while_it_generated():
    server = FaultyServer()
    server.load = load(2, 1, 0.5)
    server.holds = lambda body: not server.let_go.is_set()
    with engine_over(server) as engine:
        sampling = SamplingParams(2, 8, (1,))
        assert engine.num_gpus == 1
        started = time.monotonic()
        with watched(engine):
            engine.loop.call_soon_threadsafe(lambda: engine.loop.call_later(0.2, server.let_go_of_all))
            engine.generate([[5, 6]], sampling, deadline=20.0)
        found = {name: value for name, value in engine.take_metrics().items() if name.startswith("servers/")}
        took = time.monotonic() - started  # the event loop has heard of the end by now
        # A request of two tokens, of which the cache has one, twice.
        assert found.pop("servers/cache_hit_rate") == 0.5
        known, busy = engine.busy_seconds
        assert 0.15 < busy == known <= took
        assert found == {
            "servers/utilisation": 1.0,
            "servers/running_mean": pytest.approx(2.0),
            "servers/queued_mean": pytest.approx(1.0),
            "servers/kv_usage_mean": pytest.approx(0.5),
        }
        engine.generate([[5, 6]], sampling, deadline=20.0)  # an evaluation
        assert "servers/utilisation" not in engine.take_metrics()


def test_other_engines_have_no_servers_to_watch():
    with watched(object()):
        pass
