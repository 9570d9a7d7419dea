"""How many requests are open at once: so many for each server that takes work, as the fleet is at the moment."""

import asyncio
from collections import Counter

from helpers.fake_fleet import FakeEngine

from megatron_laser.rollout.client.health import Answered, RequestFailed, State
from megatron_laser.rollout.client.slots import Slots


def fleet_of(servers, per_server):
    engine = FakeEngine(servers)
    engine.fleet.per_server = per_server
    return engine, engine.fleet


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


class Requests:
    """Requests that stay open until they are told to end."""

    def __init__(self, slots, count):
        self.open, self.order = set(), []
        self.ends = [asyncio.Event() for _ in range(count)]
        self.tasks = [asyncio.create_task(self._one(slots, number)) for number in range(count)]

    async def _one(self, slots, number):
        async with slots:
            self.order.append(number)
            self.open.add(number)
            await self.ends[number].wait()
            self.open.discard(number)


def test_the_limit_follows_the_servers_and_waiting_requests_come_in_their_order():
    async def run():
        engine, fleet = fleet_of(2, per_server=3)
        slots = Slots(fleet)
        requests = Requests(slots, 12)
        await settled()
        assert requests.order == list(range(6)) == sorted(requests.open)
        dead = engine.member(1)
        fleet.handle(dead, RequestFailed("gone", gone=True))
        fleet.handle(dead, RequestFailed("gone", gone=True))
        assert fleet.available() == [engine.member(0)]
        for number in range(3):
            requests.ends[number].set()
        await settled()
        assert sorted(requests.open) == [3, 4, 5]  # one server's share: nobody new
        requests.ends[3].set()
        await settled()
        assert sorted(requests.open) == [4, 5, 6]
        fleet.handle(dead, Answered("default"))
        assert dead.health.state is State.HEALTHY
        await settled()
        assert sorted(requests.open) == [4, 5, 6, 7, 8, 9]
        for end in requests.ends:
            end.set()
        await asyncio.gather(*requests.tasks)
        assert requests.order == list(range(12))

    asyncio.run(run())


def test_a_request_that_is_given_up_leaves_no_gap():
    async def run():
        _, fleet = fleet_of(1, per_server=2)
        slots = Slots(fleet)
        requests = Requests(slots, 6)
        await settled()
        requests.tasks[2].cancel()  # waits
        requests.tasks[0].cancel()  # is open
        await settled()
        assert requests.open - {0} == {1, 3}
        requests.ends[1].set()
        await asyncio.sleep(0)
        requests.tasks[4].cancel()  # has been let in, perhaps, and does not know it yet
        await settled()
        assert requests.open - {0} == {3, 5}

    asyncio.run(run())


def test_no_server_gets_more_than_its_share_while_another_has_room():
    async def run():
        engine, fleet = fleet_of(3, per_server=2)
        first = engine.member(0)
        for number in range(6):
            member = await fleet.pick("generation", preferred=first)
            member.running.add(asyncio.create_task(asyncio.sleep(0), name=str(number)))
        shares = Counter({member.url: len(member.running) for member in fleet.members})
        assert set(shares.values()) == {2}
        assert await fleet.pick("generation", preferred=first) is first  # all are full: another has just died

    asyncio.run(run())
