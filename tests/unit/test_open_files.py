"""Open files: as many as requests need, an error before the start where that cannot be, and never a server's fault."""

import asyncio
import os
import resource

import pytest
from helpers.faulty_server import FaultyServer, open_engine

from megatron_laser.config import ConfigError
from megatron_laser.rollout.client.errors import OutOfFiles
from megatron_laser.rollout.client.http import ServerClient, Sessions
from megatron_laser.rollout.open_files import connections_that_fit, raise_open_files


@pytest.fixture
def soft_limit():
    """Lowers this process's soft limit for one test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def lower(soft: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))

    yield lower
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_engine_raises_the_soft_limit_to_what_its_requests_need(soft_limit):
    soft_limit(256)
    server = FaultyServer()
    engine = open_engine(server, max_concurrency_per_server=1024)
    try:
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1024
    finally:
        engine.close()
        server.stop()


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, 4096),
        (1024, 1048576, 65536),
        (1024, resource.RLIM_INFINITY, 65536),
        (100000, 1048576, 100000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_the_limit_after_it(monkeypatch, soft, hard, expected):
    found = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: found.append(limits))
    assert raise_open_files(256, 4) == expected
    assert found == ([] if expected == soft else [(expected, hard)])


def test_a_hard_limit_that_cannot_hold_the_requests_is_named_with_what_fits(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(ConfigError) as error:
        raise_open_files(256, 4)
    (problem,) = error.value.problems
    assert problem.startswith(
        "rollout.max_concurrency_per_server: 256 requests at once on each of 4 server(s)"
    )
    assert "need 1280 open files, and this process may have 1024 (ulimit -Hn)" in problem
    assert "lower rollout.max_concurrency_per_server to 192" in problem
    assert raise_open_files(192, 4) == 1024


@pytest.mark.parametrize(
    ("hard", "fit"), [(8192, 1024), (1024, 768), (100, 1), (resource.RLIM_INFINITY, 1024)]
)
def test_a_fleet_that_grows_gets_as_many_connections_as_fit(monkeypatch, hard, fit):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, hard))
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair[0]))
    assert connections_that_fit(1024) == fit
    assert all(limit >= fit for limit in limits) and bool(limits) == (fit > 1)


def test_too_many_open_files_are_not_the_servers_fault(soft_limit):
    server = FaultyServer()
    engine = open_engine(server)
    (member,) = engine.fleet.members

    async def ask():
        sessions = Sessions(None)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        soft_limit(lowest_free)
        try:
            with pytest.raises(
                OutOfFiles,
                match=r"too many open files \(ulimit -n\); lower rollout\.max_concurrency_per_server",
            ):
                await ServerClient(server.url, sessions).get("/model_info", deadline=5.0, phase="test")
            await engine.fleet.probe(member)
        finally:
            soft_limit(4096)
            await sessions.close()

    try:
        engine.run(ask(), 20.0, "test")
        assert member.health.takes_work(None)
        assert asyncio.run(asyncio.sleep(0, "the loop still works")) == "the loop still works"
    finally:
        engine.close()
        server.stop()
