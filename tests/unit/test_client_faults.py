"""What servers do to requests: only what is safe is repeated, nothing counts twice, and messages name the place."""

import gc
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from helpers.faulty_server import LENGTH, SCORE, STOP, VOCABULARY, FaultyServer, open_engine

from megatron_laser.rollout.client import driver, fleet, router
from megatron_laser.rollout.client.errors import ServerRefused, ServersLost
from megatron_laser.rollout.client.health import State
from megatron_laser.types import Generation, SamplingParams

PROMPTS = [[4, 5], [4, 6], [5, 6]]
SAMPLING = SamplingParams(2, 8, (STOP,))
ALL = {(p, s): 1 for p in range(3) for s in range(2)}
NO_ANSWERS = ["500", "502", "truncated JSON", "cut off", "reset", "closed"]
WRONG_ANSWERS = [
    "fewer tokens than stated",
    "more tokens than stated",
    "a log-prob is missing",
    "an id beyond the vocabulary",
    "the answer to another prompt",
    "no meta_info",
]
NOT_NOW = ["503", "429", "408"]


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    monkeypatch.setattr(fleet, "PROBE_EVERY", 0.05)
    monkeypatch.setattr(router, "_PROBE_EVERY", 0.05)


@pytest.fixture
def servers():
    """Makes servers and engines that are closed at the end; engine first."""
    made, engines = [], []

    class Made:
        def server(self):
            made.append(FaultyServer())
            return made[-1]

        def engine(self, *of, **settings):
            engines.append(open_engine(*of, **settings))
            return engines[-1]

    yield Made()
    for engine in engines:
        engine.close()
    for server in made:
        server.stop()


def generate(engine, *, deadline=20.0, sampling=SAMPLING):
    """The groups, and how often each response was reported."""
    finished = Counter()
    groups = engine.generate(
        PROMPTS, sampling, deadline=deadline, on_finished=lambda p, s, _: finished.update([(p, s)])
    )
    return groups, finished


def is_whole(generation):
    return generation == Generation(
        [7, 8, 9, STOP],
        [-0.5] * LENGTH,
        "stop",
        generation.weight_version,
        generation.zc_logprob,
        generation.spans,
    )


@pytest.mark.parametrize("seed", [5, None])
def test_a_repeated_request_has_its_seed_again_and_no_two_responses_share_one(seed, servers):
    server = servers.server()
    engine = servers.engine(server)
    server.faults.extend(["500"])
    generate(engine, sampling=replace(SAMPLING, seed=seed))
    first = [body["sampling_params"]["sampling_seed"] for body in server.generations]
    assert (len(first), len(set(first))) == (len(ALL) + 1, len(ALL))
    generate(engine, sampling=replace(SAMPLING, seed=seed))
    again = {body["sampling_params"]["sampling_seed"] for body in server.generations[len(first) :]}
    # Without a seed another call is to be random, also where a server would take one seed for all.
    assert len(again) == len(ALL) and (again == set(first) if seed else not again & set(first))


@pytest.mark.parametrize("fault", [*NO_ANSWERS, *WRONG_ANSWERS, *NOT_NOW])
def test_a_request_that_got_no_answer_is_repeated_and_counts_once(fault, servers, caplog):
    server = servers.server()
    engine = servers.engine(server)
    server.faults.extend([None, fault, fault])
    groups, finished = generate(engine)
    assert finished == ALL
    assert all(is_whole(generation) for group in groups for generation in group)
    assert engine.take_metrics()["rollout/retries"] == 2
    assert len(server.requests) == 6 + 2
    if fault not in NOT_NOW:  # which says nothing of the server's health
        assert f"server {server.url}: healthy -> suspect (server {server.url}, generation: " in caplog.text


def test_what_one_server_breaks_another_completes(servers):
    broken, good = servers.server(), servers.server()
    engine = servers.engine(broken, good)
    broken.faults.extend(["500"] * 100)
    groups, finished = generate(engine)
    assert finished == ALL and all(is_whole(generation) for group in groups for generation in group)
    assert len(good.requests) == 6


@pytest.mark.parametrize("status", ["400", "401", "404", "422"])
def test_a_refused_request_is_not_repeated(status, servers):
    server = servers.server()
    engine = servers.engine(server, max_concurrency_per_server=1)
    server.faults.append(status)
    with pytest.raises(ServerRefused, match=rf"server {server.url}, generation: /generate answered {status}"):
        generate(engine, sampling=SamplingParams(1, 8, (STOP,)))
    asked = Counter(tuple(body["input_ids"]) for body in server.requests)
    assert set(asked.values()) == {1} and engine.take_metrics()["rollout/retries"] == 0


def test_a_score_is_repeated_without_its_generation(servers):
    server = servers.server()
    engine = servers.engine(server, max_concurrency_per_server=1)
    server.faults.extend([None, "reset", "truncated JSON", "500"])  # a generation; three tries of its score
    groups, finished = generate(engine, sampling=SamplingParams(2, 8, (STOP,), score_token_id=SCORE))
    assert finished == ALL
    assert [g.zc_logprob for group in groups for g in group] == [-7.5] * 6
    assert len(server.generations) == 6 and len(server.requests) == 12 + 3
    metrics = engine.take_metrics()
    assert metrics["rollout/score_uncached_tokens"] == 1.0  # of six scores, not of nine


def test_a_score_waits_behind_a_full_queue_and_says_nothing_of_the_server(servers, monkeypatch):
    monkeypatch.setattr(driver, "_REQUEST_SECONDS", 0.1)
    slow, other = servers.server(), servers.server()
    for server in (slow, other):
        server.holds = lambda body: "token_ids_logprob" in body
    engine = servers.engine(slow, other)
    threading.Timer(0.6, lambda: [server.let_go_of_all() for server in (slow, other)]).start()
    assert engine.score([[4, 5, 6], [4, 6, 5]], SCORE, deadline=20.0) == [-7.5, -7.5]
    assert len(slow.requests) + len(other.requests) == 2 and not slow.aborted and not other.aborted
    assert engine.take_metrics()["rollout/retries"] == 0


def test_a_score_that_is_late_makes_no_server_suspect(servers):
    server = servers.server()
    server.holds = lambda body: "token_ids_logprob" in body
    engine = servers.engine(server)
    states = set()
    (member,) = engine.fleet.members
    handle = engine.fleet.handle
    engine.fleet.handle = lambda member, event: (handle(member, event), states.add(member.health.state))
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="score: 1 of 1 requests were not done in time"):
        engine.score([[4, 5, 6]], SCORE, deadline=0.5)
    assert time.monotonic() - started < 0.5 + 5
    assert member.health.takes_work(None) and State.SUSPECT not in states


@pytest.mark.parametrize("fault", ["500", "truncated JSON", "503"])
def test_a_fault_that_lasts_ends_at_the_deadline_and_is_named(fault, servers):
    server = servers.server()
    engine = servers.engine(server)
    server.faults.extend([fault] * 1000)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"not done in time; .*server {server.url}, generation: "):
        generate(engine, deadline=1.5)
    assert time.monotonic() - started < 1.5 + 12


def test_an_answer_that_comes_too_late_is_dropped_and_its_request_aborted(servers, monkeypatch):
    monkeypatch.setattr(driver, "_REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(driver, "_TOKEN_SECONDS", 0.0)
    slow, good = servers.server(), servers.server()
    slow.holds = lambda body: True
    engine = servers.engine(slow, good)
    groups, finished = generate(engine)
    assert finished == ALL and all(is_whole(generation) for group in groups for generation in group)
    assert 0 < len(slow.requests) <= 6  # none came back to it
    assert {body["rid"] for body in slow.requests} == set(slow.aborted)


def test_a_server_that_falls_silent_loses_its_requests_at_the_hang_deadline(servers):
    hung, good = servers.server(), servers.server()
    hung.holds = lambda body: True
    engine = servers.engine(hung, good, hang_deadline=1.5)
    hung_at = []

    def on_finished(*_):
        if not hung_at:
            hung.silent = True
            hung_at.append(time.monotonic())

    groups = engine.generate(PROMPTS, SAMPLING, deadline=30, on_finished=on_finished)
    assert time.monotonic() - hung_at[0] < 1.5 + 12
    assert all(is_whole(generation) for group in groups for generation in group)
    assert f"{hung.url} dead" in engine.fleet.describe() and "silent for" in engine.fleet.describe()
    hung.let_go.set()


def test_without_servers_the_run_hears_of_it_once_at_the_servers_deadline(servers, caplog):
    server = servers.server()
    engine = servers.engine(server, servers_deadline=1.5)
    server.holds = lambda body: bool(server.stop())  # the first request ends it
    started = time.monotonic()
    with pytest.raises(ServersLost, match=rf"generation: fewer than .* {server.url} (dead|suspect)"):
        generate(engine, deadline=60)
    assert 1.5 < time.monotonic() - started < 1.5 + 15
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_an_answer_of_other_weights_is_dropped(servers):
    server = servers.server()
    engine = servers.engine(server, max_concurrency_per_server=1)
    engine.update_weights([], 3)
    server.faults.append("other weights")
    groups, finished = generate(engine)
    assert finished == ALL
    assert {g.weight_version for group in groups for g in group} == {3}
    assert engine.take_metrics()["rollout/stale_replies"] == 1


@pytest.mark.parametrize("fault", [*NO_ANSWERS, *WRONG_ANSWERS, *NOT_NOW, "other weights"])
def test_what_fails_through_the_router_goes_to_a_server_next(fault, servers):
    server, between = servers.server(), servers.server()
    engine = servers.engine(server, router_url=between.url)
    engine.update_weights([], 1)
    between.version = server.version
    between.faults.extend([fault] * 100)
    groups, finished = generate(engine)
    assert finished == ALL and all(is_whole(generation) for group in groups for generation in group)
    assert len(server.requests) == 6 and len(between.requests) <= 6


def test_a_router_that_is_gone_costs_one_try(servers, caplog):
    server, between = servers.server(), servers.server()
    engine = servers.engine(server, router_url=between.url)
    generate(engine)
    assert len(between.requests) == 6 and not server.requests
    between.stop()
    _, finished = generate(engine)
    assert finished == ALL and len(server.requests) == 6
    generate(engine)
    assert len(server.requests) == 12
    assert caplog.text.count("requests go to the servers for 30 s") == 1
    assert f"server {between.url}, generation through the router: /generate" in caplog.text


def test_a_router_that_hangs_is_found_by_asking_it(servers):
    server, between = servers.server(), servers.server()
    engine = servers.engine(server, router_url=between.url, hang_deadline=1.5)
    between.silent = True
    started = time.monotonic()
    _, finished = generate(engine)
    assert finished == ALL and len(server.requests) == 6
    assert time.monotonic() - started < 1.5 + 12
    between.let_go.set()


def test_a_server_that_hangs_behind_a_router_does_not_hold_its_requests(servers):
    hung, good, between = servers.server(), servers.server(), servers.server()
    between.holds = lambda body: True  # as a router does whose server does not answer
    engine = servers.engine(hung, good, router_url=between.url, hang_deadline=1.5)
    hung.silent = True
    started = time.monotonic()
    _, finished = generate(engine)
    assert finished == ALL and len(good.requests) == 6
    assert time.monotonic() - started < 1.5 + 12
    hung.let_go.set()


def test_one_server_that_hangs_does_not_hide_the_death_of_another(servers):
    hung, dies = servers.server(), servers.server()
    engine = servers.engine(hung, dies, hang_deadline=60.0)
    hung.silent = True
    dies.stop()
    ends = time.monotonic() + 8  # a probe of the hung one takes 10
    while f"{dies.url} dead" not in engine.fleet.describe():
        assert time.monotonic() < ends, engine.fleet.describe()
        time.sleep(0.05)
    hung.let_go.set()


def test_a_server_that_could_not_catch_up_is_not_stuck_in_its_update(servers):
    back, other = servers.server(), servers.server()
    engine = servers.engine(back, other)
    engine.update_weights([], 1)
    tries = []

    async def catch_up(member):
        tries.append(member.url)
        if len(tries) == 1:
            raise KeyError("anything")
        back.version = engine.label(1)
        return back.version

    engine.fleet.catch_up = catch_up
    back.version = "default"
    ends = time.monotonic() + 10
    while len(tries) < 2 or len(engine.fleet.available()) < 2:
        assert time.monotonic() < ends, engine.fleet.describe()
        time.sleep(0.05)
    assert set(tries) == {back.url}


def test_ids_beyond_the_vocabulary_reach_no_server(servers):
    server = servers.server()
    engine = servers.engine(server)
    with pytest.raises(ValueError, match=f"token id {VOCABULARY}"):
        engine.generate([[VOCABULARY]], SAMPLING, deadline=5)
    assert not server.requests
