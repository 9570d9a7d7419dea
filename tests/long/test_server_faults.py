"""Faults of real SGLang servers under a run: nothing is lost or counted twice, and no wait passes its deadline.

Two servers and a router are shared. What a test kills, `serve` starts again (half a minute); the next test waits.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from helpers.sglang_server import START_DEADLINE, call, mark_of, serve_config, wait_for
from helpers.tiny_run import end_session, start_run
from helpers.torchrun import worker_environment
from transformers import AutoModelForCausalLM

from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.errors import ServersLost, WeightsNeeded
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.endpoints import read_endpoints
from megatron_laser.rollout.servers import ServeProcess, guard
from megatron_laser.types import SamplingParams
from megatron_laser.weight_sync import disk, sync_weights
from megatron_laser.weight_sync.disk import DiskTransport
from megatron_laser.weight_sync.distributed import DistributedTransport
from megatron_laser.weight_sync.peers import Peers

pytestmark = [pytest.mark.long, pytest.mark.sglang, pytest.mark.timeout(900)]
pytestmark += [pytest.mark.usefixtures("process_group")]

VOCABULARY, EOS = 28, 1
HANG = 20.0  # seconds, of the run; `serve` is more patient, so that what the run does is seen alone
SYNC = 60.0
PROMPTS = [[4 + i, 5, 6] for i in range(8)]
SAMPLING = SamplingParams(24, 50, (EOS,))
ALL = {(p, s): 1 for p in range(len(PROMPTS)) for s in range(SAMPLING.samples_per_prompt)}


class Servers:
    """The servers of one `serve`, and what tests do to them."""

    def __init__(self, serve, folder):
        self.serve = serve
        self.model = folder / "run"

    def read(self):
        return read_endpoints(self.serve.endpoints)

    def wait_until_all_answer(self):
        def look():
            found = self.read()
            return found if all(server.state in ("ready", "held") for server in found.servers) else None

        return wait_for(look, "two servers that answer", START_DEADLINE)

    def wait_until_seen_to_be_gone(self, number, start):
        wait_for(lambda: self.read().servers[number].start > start, "new process", START_DEADLINE)

    def kill(self, number):
        os.kill(self.read().servers[number].pid, signal.SIGKILL)

    def scheduler(self, number):
        children = psutil.Process(self.read().servers[number].pid).children(recursive=True)
        (found,) = [child for child in children if "sglang::scheduler" in " ".join(child.cmdline())]
        return found

    def engine(self, transport=None, *, only=None, router=False, **settings):
        """An engine over all servers, or over number `only`."""
        endpoints = self.wait_until_all_answer()

        def source():
            found = self.read().servers
            return [s for i, s in enumerate(found) if only in (None, i) and s.state != "failed"]

        engine = SglangEngine(
            source,
            api_key=endpoints.api_key,
            expected=Expected(VOCABULARY, "qwen2", "float32"),
            router_url=endpoints.router_url if router else None,
            transport=transport,
            **{"hang_deadline": HANG, "sync_deadline": SYNC} | settings,
        )
        wanted = 2 if only is None else 1
        engine.run(engine.fleet.wait_until_up(wanted, 30.0), 30.0, "waiting for the test's servers")
        return contextlib.closing(engine)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    config = serve_config(folder / "run", sglang={"servers": 2, "router": True, "hang_deadline": 120})
    serve = ServeProcess(config, folder / "serve")
    try:
        serve.wait_ready(2 * START_DEADLINE)
        yield Servers(serve, folder)
    finally:
        serve.stop()


@pytest.fixture(scope="module")
def weights(servers):
    model = AutoModelForCausalLM.from_pretrained(servers.model, dtype=torch.float32)
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def distributed(seconds=SYNC):
    return DistributedTransport(
        peers=Peers(torch_version=torch.__version__, nccl_version=None),
        dtype=torch.float32,
        bucket_bytes=20_000,
        seconds=seconds,
        address=None,
        flattened=True,
        always_verify=False,
    )


def generate(engine, fault=None, deadline=240.0):
    """Sample everything; `fault` happens when ten responses have ended. Returns the groups and the seconds after it."""
    finished, at = Counter(), []

    def on_finished(prompt, sample, generation):
        finished.update([(prompt, sample)])
        if finished.total() == 10 and fault is not None:
            fault()
            at.append(time.monotonic())

    groups = engine.generate(PROMPTS, SAMPLING, deadline=deadline, on_finished=on_finished)
    assert finished == ALL
    for generation in (g for group in groups for g in group):
        assert generation.finish_reason in ("stop", "length") and generation.weight_version == engine.version
        assert 0 < len(generation.response_ids) == len(generation.logprobs) <= SAMPLING.max_new_tokens
    return groups, time.monotonic() - at[0] if at else 0.0


def synced(engine, weights, version):
    assert sync_weights(weights, engine, version) is None
    return engine


def test_a_killed_servers_work_goes_to_the_other_and_it_serves_again_only_with_the_current_weights(
    servers, weights
):
    with servers.engine(distributed()) as engine:
        synced(engine, weights, 1)
        before = servers.read().servers[0]
        _, seconds = generate(engine, lambda: servers.kill(0))
        print(f"\nall responses {seconds:.1f} s after a server was killed")
        assert engine.take_metrics()["rollout/retries"] > 0
        servers.wait_until_seen_to_be_gone(0, before.start)
        servers.wait_until_all_answer()
        engine.run(engine.fleet.wait_until_up(2, 60.0), 60.0, "the server's return")
        (usable,) = engine.on_loop(engine.fleet.available)
        assert usable.url == servers.read().servers[1].url  # the other one has the weights of the folder
        generate(engine)
        assert engine.take_metrics()["rollout/stale_replies"] == 0
        synced(engine, weights, 2)
        assert len(engine.on_loop(engine.fleet.available)) == 2
        generate(engine)
        infos = [
            call(s.url, "/model_info", api_key=servers.read().api_key)["weight_version"]
            for s in servers.read().servers
        ]
        assert infos == [engine.label(2)] * 2
        assert servers.read().servers[0].start == before.start + 1


def test_a_hung_servers_work_goes_to_the_other_within_the_hang_deadline(servers, weights):
    with servers.engine(distributed()) as engine:
        synced(engine, weights, 1)
        scheduler = servers.scheduler(1)
        url = servers.read().servers[1].url
        try:
            _, seconds = generate(engine, scheduler.suspend)
            described = engine.fleet.describe()
        finally:
            scheduler.resume()
        print(f"\nall responses {seconds:.1f} s after a scheduler was stopped, hang_deadline {HANG:g} s")
        assert f"{url} dead" in described and "silent for" in described
        assert seconds < HANG + HANG / 3 + 40  # the last probe's own deadline, and the work itself
        wait_for(lambda: len(engine.on_loop(engine.fleet.available)) == 2, "return of the server", 60)
        generate(engine)  # what it still had of the old requests counts nowhere


def test_a_server_that_hangs_in_a_sync_is_left_out_at_the_syncs_deadline(servers, weights):
    limit = 15.0
    with servers.engine(distributed(limit), sync_deadline=limit) as engine:
        synced(engine, weights, 1)
        scheduler, url = servers.scheduler(0), servers.read().servers[0].url
        started = time.monotonic()
        try:
            trouble = sync_weights(midway(weights, scheduler.suspend), engine, 2)
            print(f"\ngiven up after {time.monotonic() - started:.1f} s of {limit:g}: {trouble}")
            assert url in trouble and "receiving weights" in trouble
            assert time.monotonic() - started < limit + 10
            engine.run(engine.fleet.wait_until_up(1, 60.0), 60.0, "waiting for servers")
            synced(engine, weights, 2)
            assert time.monotonic() - started < 2 * limit + 20
            generate(engine)
        finally:
            scheduler.resume()
        engine.run(engine.fleet.wait_until_up(2, 60.0), 60.0, "the server's return")
        synced(engine, weights, 3)
        assert len(engine.on_loop(engine.fleet.available)) == 2
        generate(engine)


def midway(weights, fault):
    """The stream, with `fault` in the middle of it."""
    for number, item in enumerate(weights):
        if number == len(weights) // 2:
            fault()
        yield item


def test_without_its_only_server_a_run_hears_why_and_goes_on_when_it_is_back(servers, weights):
    with servers.engine(distributed(), only=1, servers_deadline=8.0) as engine:
        synced(engine, weights, 1)
        before = servers.read().servers[1]
        killed = []

        def kill():
            servers.kill(1)
            killed.append(time.monotonic())

        with pytest.raises(ServersLost, match=rf"generation: fewer than .* healthy servers .*{before.url}"):
            generate(engine, kill)
        assert time.monotonic() - killed[0] < 8.0 + 20
        servers.wait_until_seen_to_be_gone(1, before.start)
        servers.wait_until_all_answer()
        engine.run(engine.fleet.wait_until_up(1, 60.0), 60.0, "the server's return")
        with pytest.raises(WeightsNeeded, match=rf"generation: servers came back .*{before.url}"):
            generate(engine)
        synced(engine, weights, 1)
        generate(engine)


def test_a_server_killed_between_two_buckets_ends_the_sync_at_once_and_the_next_try_reaches_the_other(
    servers, weights
):
    with servers.engine(distributed()) as engine:
        synced(engine, weights, 1)
        before = servers.read().servers[0]
        killed = []

        def kill():
            servers.kill(0)
            killed.append(time.monotonic())

        trouble = sync_weights(midway(weights, kill), engine, 2)
        print(f"\ngiven up {time.monotonic() - killed[0]:.1f} s after a server was killed: {trouble}")
        assert trouble is not None and before.url in trouble and "receiving weights" in trouble
        assert engine.version == 1
        engine.run(engine.fleet.wait_until_up(1, 60.0), 60.0, "waiting for servers")
        synced(engine, weights, 2)
        print(f"the other has the weights {time.monotonic() - killed[0]:.1f} s after it")
        assert time.monotonic() - killed[0] < SYNC
        generate(engine)
        servers.wait_until_seen_to_be_gone(0, before.start)


def test_a_server_killed_while_it_loads_weights_from_disk_is_left_out_and_catches_up(
    servers, weights, tmp_path, monkeypatch
):
    transport = DiskTransport(
        tmp_path / "weights",
        source=servers.model,
        dtype=torch.float32,
        seconds=SYNC,
        always_verify=False,
    )
    with servers.engine(transport) as engine:
        synced(engine, weights, 1)
        before = servers.read().servers[1]
        scheduler, body = servers.scheduler(1), disk.from_disk_body

        def stop_then_kill(folder, label):
            if scheduler.status() != psutil.STATUS_STOPPED:
                scheduler.suspend()  # the update reaches it and cannot end
                threading.Timer(1.0, servers.kill, [1]).start()
            return body(folder, label)

        monkeypatch.setattr(disk, "from_disk_body", stop_then_kill)
        started = time.monotonic()
        synced(engine, weights, 2)
        print(f"\nthe other has the weights after {time.monotonic() - started:.1f} s")
        monkeypatch.setattr(disk, "from_disk_body", body)
        assert time.monotonic() - started < SYNC
        generate(engine)
        servers.wait_until_seen_to_be_gone(1, before.start)
        wait_for(lambda: len(engine.on_loop(engine.fleet.available)) == 2, "server that caught up", 280)
        generate(engine)
        assert engine.take_metrics()["rollout/stale_replies"] == 0


def test_without_its_router_a_run_asks_the_servers(servers, weights):
    with servers.engine(distributed(), router=True) as engine:
        synced(engine, weights, 1)
        generate(engine)
        (pid,) = guard.marked(f"{mark_of(servers.read().servers[0].pid)}/router")
        _, seconds = generate(engine, lambda: os.kill(pid, signal.SIGKILL))
        print(f"\nall responses {seconds:.1f} s after the router was killed")
        generate(engine)


def test_a_server_killed_behind_the_router_loses_no_response(servers, weights):
    with servers.engine(distributed(), router=True) as engine:
        synced(engine, weights, 1)
        wait_for(lambda: router_answers(servers), "answer of the router", 120)
        before = servers.read().servers[0]
        generate(engine, lambda: servers.kill(0))
        servers.wait_until_seen_to_be_gone(0, before.start)


def router_answers(servers):
    found = servers.read()
    workers = call(found.router_url, "/workers", api_key=found.api_key, timeout=10)["workers"]
    return len(workers) == 2 and all(worker["is_healthy"] for worker in workers)


def test_a_run_killed_while_servers_are_paused_and_one_without_servers_go_on_where_they_were(
    servers, tmp_path
):
    endpoints = servers.wait_until_all_answer()
    folder = tmp_path / "out"
    arguments = [
        str(servers.model / "run.yaml"),
        "rollout.engine=sglang",
        f"rollout.sglang.endpoints={servers.serve.endpoints}",
        "rollout.sglang.device=cpu",
        "rollout.servers_deadline=5",
        f"run.output_dir={folder}",
        "run.steps=12",
    ]
    script = Path(__file__).with_name("dying_in_sync.py")
    status, output = finish(spawn(script, "3", *arguments))
    assert status == -signal.SIGKILL, output[-4000:]
    assert steps_of(folder) == [1, 2]  # step 3 was trained, but died before it was recorded or saved
    for server in endpoints.servers:
        body = {"input_ids": [4, 5], "sampling_params": {"max_new_tokens": 2}}
        with pytest.raises((TimeoutError, urllib.error.URLError)):
            call(server.url, "/generate", body, api_key=endpoints.api_key, timeout=3)  # paused

    resumed = start_run(Path(arguments[0]), *arguments[1:])
    try:
        wait_for(lambda: 4 in steps_of(folder) or resumed.poll() is not None, "step 4", 240)
        servers.kill(0)
        servers.kill(1)
    except BaseException:
        end_session(resumed)
        raise
    status, output = finish(resumed)
    assert status == 2 and re.search(r"error: saved after step \d+ and stopped: .*http://", output), output[
        -4000:
    ]
    done = steps_of(folder)
    assert 4 <= len(done) < 12 and done == list(range(1, len(done) + 1))

    status, output = finish(start_run(Path(arguments[0]), *arguments[1:]))
    assert status == 0, output[-4000:]
    assert steps_of(folder) == list(range(1, 13))


def spawn(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=worker_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """Exit status and output."""
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        end_session(process)
    return process.returncode, output


def steps_of(folder):
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line["step"] for line in lines if "policy_loss" in line]
