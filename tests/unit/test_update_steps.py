"""The order of a weight update, and servers that are not as quiet as they should be."""

import pytest
from helpers.faulty_server import STOP, FaultyServer, open_engine

from megatron_laser.rollout.client import fleet
from megatron_laser.types import SamplingParams
from megatron_laser.weight_sync import sync_weights
from megatron_laser.weight_sync import update as steps


@pytest.fixture
def servers(monkeypatch):
    monkeypatch.setattr(fleet, "PROBE_EVERY", 0.05)
    made = [FaultyServer(), FaultyServer()]
    yield made
    for server in made:
        server.stop()


@pytest.fixture
def engine(servers):
    made = open_engine(*servers)
    yield made
    made.close()


def test_generation_is_paused_and_the_cache_empty_before_weights_change_and_goes_on_after(servers, engine):
    assert sync_weights([], engine, 1) is None
    order = ["continue_generation", "pause_generation", "flush_cache", "update_weights_from_disk"]
    for server in servers:
        assert server.calls == [f"/{call}" for call in [*order, "continue_generation"]]
        assert server.version == engine.label(1) and not server.paused


def test_a_server_that_was_paused_in_place_takes_weights(servers, engine):
    """As `serve` leaves one that it has restarted, if a request was half done."""
    servers[0].paused = servers[0].stuck = True
    assert sync_weights([], engine, 1) is None
    assert [server.version for server in servers] == [engine.label(1)] * 2
    assert not servers[0].paused


def test_a_cache_that_cannot_be_flushed_for_a_moment_is_no_failure(servers, engine):
    servers[1].flush_refusals = 3
    assert sync_weights([], engine, 1) is None
    assert servers[1].version == engine.label(1)


def test_a_server_whose_cache_cannot_be_flushed_is_left_out(servers, engine, monkeypatch):
    monkeypatch.setattr(steps, "_FLUSH_SECONDS", 0.5)
    servers[1].flush_refusals = 10**6
    assert sync_weights([], engine, 1) is None
    assert servers[1].version == "default"
    groups = engine.generate([[4, 5]], SamplingParams(6, 8, (STOP,)), deadline=20)
    assert len(groups[0]) == 6 and not servers[1].requests


def test_when_no_server_takes_the_weights_each_reason_is_told(servers, engine, monkeypatch):
    monkeypatch.setattr(steps, "_FLUSH_SECONDS", 0.5)
    for server in servers:
        server.flush_refusals = 10**6
    trouble = sync_weights([], engine, 1)
    for server in servers:
        assert f"server {server.url}, flushing the cache: /flush_cache answered 400" in trouble
    assert engine.version == 0
