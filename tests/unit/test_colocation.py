"""Trainer and servers on the same GPUs: the order in which memory changes hands, step by step and when servers fail.

The servers are fakes that end, as real ones do, when anything comes out of order; a real server runs in
tests/distributed/test_train_colocated.py.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from helpers.fake_memory import FakeMemory, running

from megatron_laser.model import platform
from megatron_laser.observability.timers import Timers
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.health import State
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.endpoints import ServerEndpoint
from megatron_laser.run.colocation import SERVERS_HOLD, TRAINER_HOLDS, Colocation, MemoryPhase
from megatron_laser.trainer.offload import ALL_PARTS, Part
from megatron_laser.weight_sync import sync_weights
from megatron_laser.weight_sync.checksums import StreamDigest
from megatron_laser.weight_sync.colocated import ColocatedTransport
from megatron_laser.weight_sync.server_memory import ALL_TAGS, CACHE, WEIGHTS, ServerMemory

WEIGHT_STREAM = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.ones(4))]


class RecordingOffload:
    """A trainer whose state is a set of names; writes what moves into the servers' log."""

    def __init__(self, log):
        self.on_device, self.log = ALL_PARTS, log

    def offload(self, parts):
        leaving = self.on_device & frozenset(parts)
        self.on_device -= leaving
        self.log += [f"trainer offloads {part.value}" for part in Part if part in leaving]
        return len(leaving)

    def onload(self, parts):
        entering = frozenset(parts) - self.on_device
        self.on_device |= entering
        self.log += [f"trainer loads {part.value}" for part in Part if part in entering]
        return len(entering)


class Ranks:
    """One rank: rank 0 with a controller."""

    def __init__(self, engine):
        self.controller = SimpleNamespace(engine=engine)

    def phase(self, name):
        return contextlib.nullcontext()

    def run_on_controller(self, phase, work):
        return work(self.controller)

    ask_controller = run_on_controller


@contextlib.contextmanager
def together(*servers, starts=None, **settings):
    """(colocation, ranks, engine, state) over fakes; the first server's log also gets the trainer's moves."""
    digest = StreamDigest(on_cpu=True)
    assert len(list(digest.watch(WEIGHT_STREAM))) == len(WEIGHT_STREAM)
    for server in servers:
        server.sums = digest.sums()
    with running(*servers):
        starts = starts if starts is not None else [1] * len(servers)
        transport = ColocatedTransport(
            dtype=torch.float32, bucket_bytes=16, seconds=10.0, always_verify=False
        )
        engine = SglangEngine(
            lambda: [ServerEndpoint(fake.url, start) for fake, start in zip(servers, starts)],
            api_key=None,
            expected=Expected(28, None, "float32"),
            min_servers=len(servers),
            transport=transport,
        )
        state = RecordingOffload(servers[0].log)
        runtime = SimpleNamespace(world_size=1)
        try:
            yield (
                Colocation(state, runtime, Timers(), seconds=10.0, **settings),
                Ranks(engine),
                engine,
                state,
            )
        finally:
            engine.close()


def sync(colocation, ranks, engine, version):
    """What the loop does for a sync; returns what went wrong."""
    colocation.switch_to(MemoryPhase.SYNC, ranks)
    trouble = sync_weights(iter(WEIGHT_STREAM), engine, version)
    return trouble or colocation.switch_to(MemoryPhase.GENERATE, ranks)


def take(log):
    found = list(log)
    log.clear()
    return found


GIVING_ALL_BACK = ["pause_generation", "flush_cache", "release_memory_occupation kv_cache weights cuda_graph"]
GIVING_CACHE_BACK = ["pause_generation", "flush_cache", "release_memory_occupation kv_cache cuda_graph"]
SENDING = [
    *("pause_generation", "flush_cache", "end_weight_update", "begin_weight_update"),
    *("update_weights_from_tensor", "update_weights_from_tensor", "end_weight_update"),
]
CHECKING = ["weights_checker"]
GOING_ON = [
    *("resume_memory_occupation cuda_graph", "resume_memory_occupation kv_cache"),
    "continue_generation",
]


def test_an_optimizer_that_comes_for_its_step_alone_stays_away_while_training_begins():
    server = FakeMemory()
    while_training = ALL_PARTS - {Part.OPTIMIZER}
    with together(server, while_training=while_training) as (colocation, ranks, engine, state):
        colocation.make_room()
        assert sync(colocation, ranks, engine, 0) == ""
        colocation.switch_to(MemoryPhase.TRAIN, ranks)
        assert state.on_device == while_training
        state.onload({Part.OPTIMIZER})  # the step that fails leaves it there
        colocation.switch_to(MemoryPhase.SAVE, ranks)
        assert state.on_device == {Part.PARAMETERS, Part.OPTIMIZER}
        colocation.switch_to(MemoryPhase.GENERATE, ranks)
        assert state.on_device == frozenset()


def test_a_step_goes_round_in_this_order():
    server = FakeMemory()
    with together(server) as (colocation, ranks, engine, state):
        colocation.make_room()
        assert take(server.log) == [f"trainer offloads {part.value}" for part in Part]

        assert sync(colocation, ranks, engine, 0) == ""  # the first one: servers have just started
        found = [line for line in take(server.log) if line not in CHECKING]
        assert found == [
            *GIVING_CACHE_BACK,
            "trainer loads parameters",
            *SENDING,
            "trainer offloads parameters",
            *GOING_ON,
        ]
        assert state.on_device == frozenset() and server.held == ALL_TAGS and not server.paused

        assert colocation.switch_to(MemoryPhase.TRAIN, ranks) == ""
        assert take(server.log) == [*GIVING_ALL_BACK, *(f"trainer loads {part.value}" for part in Part)]
        assert state.on_device == ALL_PARTS and server.held == set() and server.paused

        assert sync(colocation, ranks, engine, 1) == ""
        assert take(server.log) == [
            "trainer offloads reference model",
            "trainer offloads gradients",
            "trainer offloads optimizer state",
            "resume_memory_occupation weights",
            *SENDING,
            *CHECKING,  # the first update
            "trainer offloads parameters",
            *GOING_ON,
        ]
        assert [member.health.state for member in engine.fleet.members] == [State.HEALTHY]
        assert engine.fleet.available() and engine.fleet.members[0].health.version == engine.label(1)
    assert not server.died_of


def test_memory_that_servers_have_closed_is_freed_after_every_bucket(monkeypatch):
    server, collected = FakeMemory(), []
    monkeypatch.setattr(platform, "collect_shared_memory", lambda: collected.append(len(server.received)))
    with together(server) as (colocation, ranks, engine, _):
        colocation.make_room()
        assert sync(colocation, ranks, engine, 0) == ""
    assert collected[:2] == [1, 2]


def test_a_save_leaves_the_servers_their_weights():
    server = FakeMemory()
    with together(server) as (colocation, ranks, engine, state):
        colocation.make_room()
        sync(colocation, ranks, engine, 0)
        take(server.log)
        with colocation.during(MemoryPhase.SAVE, ranks):
            assert state.on_device == {Part.PARAMETERS, Part.OPTIMIZER}
            assert server.held == {WEIGHTS} and server.paused
        assert take(server.log) == [
            *GIVING_CACHE_BACK,
            *("trainer loads parameters", "trainer loads optimizer state"),
            *("trainer offloads parameters", "trainer offloads optimizer state"),
            *GOING_ON,
        ]
        assert engine.fleet.available()  # under the same version: nothing is sent again
    assert not server.died_of


@pytest.mark.parametrize("phase", list(MemoryPhase))
def test_in_no_turn_do_trainer_and_servers_need_more_than_there_is(phase):
    heavy_trainer = TRAINER_HOLDS[phase] & {Part.GRADIENTS, Part.OPTIMIZER, Part.REFERENCE}
    assert not (CACHE in SERVERS_HOLD[phase] and TRAINER_HOLDS[phase])  # the cache takes all that is free
    assert not (Part.GRADIENTS in heavy_trainer and SERVERS_HOLD[phase])


def test_for_other_settings_nothing_is_done():
    ranks = SimpleNamespace()  # has nothing that could be called
    colocation = Colocation(None, SimpleNamespace(), Timers(), seconds=1.0)
    colocation.make_room()
    with colocation.during(MemoryPhase.SAVE, ranks):
        assert colocation.switch_to(MemoryPhase.TRAIN, ranks) == ""


def test_each_server_process_holds_what_it_was_left_with():
    first, second = FakeMemory(), FakeMemory()
    starts = [1, 1]
    with together(first, second, starts=starts) as (colocation, ranks, engine, _):
        colocation.make_room()
        sync(colocation, ranks, engine, 0)
        colocation.switch_to(MemoryPhase.TRAIN, ranks)
        assert first.held == second.held == set()
        # The second one dies and comes back as a new process: all its memory is its own again.
        second.held, second.paused, second.version = set(ALL_TAGS), False, "default"
        starts[1] = 2
        member = next(member for member in engine.fleet.members if member.url == second.url)

        async def probed():
            engine.fleet._look()
            await engine.fleet.probe(member)

        engine.run(probed(), 10.0, "probing")
        assert sync(colocation, ranks, engine, 1) == ""
        assert first.held == second.held == ALL_TAGS
        assert first.version == second.version == engine.label(1)
        assert len(engine.fleet.available()) == 2
    assert not first.died_of and not second.died_of


def test_a_server_that_is_not_idle_yet_is_asked_again():
    server = FakeMemory(busy=2)
    with together(server) as (colocation, ranks, _, state):
        colocation.switch_to(MemoryPhase.TRAIN, ranks)
        assert state.on_device == ALL_PARTS
        assert take(server.log)[:4] == ["pause_generation", *["flush_cache"] * 3]
        assert server.held == set()
    assert not server.died_of


def test_a_server_that_does_not_come_back_is_left_out_and_synced_again():
    first, second = FakeMemory(), FakeMemory()
    with together(first, second) as (colocation, ranks, engine, _):
        colocation.make_room()
        sync(colocation, ranks, engine, 0)
        colocation.switch_to(MemoryPhase.TRAIN, ranks)
        second.broken = {"/resume_memory_occupation"}
        assert sync(colocation, ranks, engine, 1) == ""
        assert [member.url for member in engine.fleet.available()] == [first.url]
        second.broken = set()
        engine.run(engine.fleet.wait_until_up(2, 20.0), 20.0, "waiting")
        assert sync(colocation, ranks, engine, 1) == ""
        assert len(engine.fleet.available()) == 2 and second.held == ALL_TAGS
    assert not first.died_of and not second.died_of


def test_when_no_server_comes_back_the_sync_has_failed():
    server = FakeMemory()
    with together(server) as (colocation, ranks, engine, _):
        colocation.make_room()
        sync(colocation, ranks, engine, 0)
        colocation.switch_to(MemoryPhase.TRAIN, ranks)
        colocation.switch_to(MemoryPhase.SYNC, ranks)
        assert sync_weights(iter(WEIGHT_STREAM), engine, 1) is None
        server.broken = {"/continue_generation"}
        trouble = colocation.switch_to(MemoryPhase.GENERATE, ranks)
        assert "no server can generate" in trouble and server.url in trouble and "told to fail" in trouble
        assert engine.fleet.available() == []
        server.broken = set()
        engine.run(engine.fleet.wait_until_up(1, 20.0), 20.0, "waiting")
        assert sync(colocation, ranks, engine, 1) == ""
        assert engine.fleet.available()
    assert not server.died_of


def test_every_tensor_parallel_rank_gets_handles_of_its_own():
    server = FakeMemory(tensor=2)
    with together(server) as (colocation, ranks, engine, _):
        colocation.make_room()
        assert sync(colocation, ranks, engine, 0) == ""
        for body in server.received:
            first, second = body["serialized_named_tensors"]
            assert first and second
    assert [body.get("weight_version") for body in server.received[:-1]] == [None]


def test_an_update_session_that_was_left_open_is_closed_first():
    server = FakeMemory(session=True)
    with together(server) as (colocation, ranks, engine, _):
        colocation.make_room()
        assert sync(colocation, ranks, engine, 0) == ""
    assert not server.session


def test_nothing_is_released_twice():
    server = FakeMemory()
    with together(server) as (_, _, engine, _):
        server_memory = ServerMemory(engine, seconds=10.0)
        server_memory.release({CACHE})
        server_memory.release(ALL_TAGS)
        server_memory.release(ALL_TAGS)
        assert [line for line in server.log if line.startswith("release")] == [
            "release_memory_occupation kv_cache",
            "release_memory_occupation weights cuda_graph",
        ]
        assert server_memory.resume({WEIGHTS}) == "" and server_memory.resume(ALL_TAGS) == ""
        assert server_memory.held(engine.fleet.members[0]) == ALL_TAGS
    assert not server.died_of
