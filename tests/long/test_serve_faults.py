"""Faults of real SGLang servers under `serve`: each needs one or two starts of half a minute."""

import contextlib
import os
import signal
import time
import urllib.error
from pathlib import Path

import psutil
import pytest
from helpers.sglang_server import START_DEADLINE, call, mark_of, serve_config, wait_for

from megatron_laser.rollout.endpoints import read_endpoints
from megatron_laser.rollout.servers import ServeProcess, guard

pytestmark = [pytest.mark.long, pytest.mark.sglang, pytest.mark.timeout(1200)]
PROMPT = {"input_ids": [5, 24, 6, 27], "sampling_params": {"max_new_tokens": 4, "temperature": 1.0}}


@contextlib.contextmanager
def serving(folder: Path, **sglang):
    serve = ServeProcess(
        serve_config(folder / "run", sglang={"hang_deadline": 30, **sglang}), folder / "serve"
    )
    try:
        yield serve
    finally:
        serve.stop()


def restarted(serve: ServeProcess, state: str, number: int = 0):
    def look():
        found = read_endpoints(serve.endpoints)
        server = found.servers[number]
        return found if server.start == 2 and server.state == state else None

    return wait_for(look, f"server {number} in state {state}")


def named(pid: int, name: str) -> psutil.Process:
    """The server's child with this title."""
    (child,) = [c for c in psutil.Process(pid).children(recursive=True) if name in " ".join(c.cmdline())]
    return child


def test_a_stopped_scheduler_is_a_hang_and_the_server_is_started_again(tmp_path):
    with serving(tmp_path) as serve:
        before = serve.wait_ready()
        (server,) = before.servers
        named(server.pid, "sglang::scheduler").suspend()
        stopped = time.monotonic()
        wait_for(lambda: read_endpoints(serve.endpoints).servers[0].state != "ready", "hang", 90)
        print(f"\nhang found after {time.monotonic() - stopped:.0f} s, hang_deadline 30 s")
        after = restarted(serve, "ready")
        print(f"answers again after {time.monotonic() - stopped:.0f} s")
        assert not psutil.pid_exists(server.pid) or psutil.Process(server.pid).status() == "zombie"
        assert len(call(after.servers[0].url, "/generate", PROMPT, api_key=after.api_key)["output_ids"]) == 4
        assert len(guard.marked(mark_of(after.servers[0].pid))) <= 4  # nothing of the first start is left


def test_a_paused_server_is_healthy_however_long_the_pause(tmp_path):
    with serving(tmp_path, hang_deadline=10) as serve:
        endpoints = serve.wait_ready()
        url, key = endpoints.servers[0].url, endpoints.api_key
        call(url, "/pause_generation", {"mode": "in_place"}, api_key=key)
        time.sleep(25)
        assert read_endpoints(serve.endpoints).servers == endpoints.servers
        call(url, "/continue_generation", {}, api_key=key)
        assert len(call(url, "/generate", PROMPT, api_key=key)["output_ids"]) == 4


def test_a_killed_server_of_an_updated_fleet_comes_back_held(tmp_path):
    with serving(tmp_path) as serve:
        endpoints = serve.wait_ready()
        url, key = endpoints.servers[0].url, endpoints.api_key
        update = {"model_path": str(tmp_path / "run"), "weight_version": "7"}

        def give_weights():
            call(url, "/pause_generation", {"mode": "abort"}, api_key=key)
            call(url, "/update_weights_from_disk", update, api_key=key, timeout=120)
            call(url, "/continue_generation", {}, api_key=key)

        give_weights()
        assert call(url, "/model_info", api_key=key)["weight_version"] == "7"
        time.sleep(12)  # serve sees it with its next probe
        os.kill(endpoints.servers[0].pid, signal.SIGKILL)
        held = restarted(serve, "held")
        assert held.servers[0].url == url
        with pytest.raises((TimeoutError, urllib.error.URLError)):
            call(url, "/generate", PROMPT, api_key=key, timeout=5)  # it waits for the weights
        give_weights()
        restarted(serve, "ready")
        info = call(url, "/generate", PROMPT, api_key=key)["meta_info"]
        assert info["weight_version"] == "7"


def test_nothing_outlives_a_killed_serve_even_while_servers_start(tmp_path):
    for wait in ("starting", "ready"):
        with serving(tmp_path / wait) as serve:
            if wait == "ready":
                serve.wait_ready()
            pid = wait_for(lambda serve=serve: read_endpoints(serve.endpoints).servers[0].pid, "process")
            if wait == "starting":
                wait_for(lambda pid=pid: psutil.Process(pid).children(), "children")
            mark = mark_of(pid)
            os.kill(serve.pid, signal.SIGKILL)
            wait_for(lambda mark=mark: not guard.marked(mark), "end of the servers", 30)
            wait_for(lambda serve=serve: not serve.endpoints.exists(), "removal of the endpoints", 30)


def test_a_router_spreads_requests_and_comes_back_when_it_is_killed(tmp_path):
    with serving(tmp_path, servers=2, router=True) as serve:
        endpoints = serve.wait_ready(2 * START_DEADLINE)
        router, key = endpoints.router_url, endpoints.api_key
        wait_for(lambda: "the router" in serve.last_words()[-1], "router", 60)
        assert len(call(router, "/generate", PROMPT, api_key=key)["output_ids"]) == 4
        with pytest.raises(urllib.error.HTTPError, match="401"):
            call(router, "/generate", PROMPT)
        (pid,) = guard.marked(f"{mark_of(endpoints.servers[0].pid)}/router")
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()

        def generated():
            return call(router, "/generate", PROMPT, api_key=key, timeout=10)["output_ids"]

        assert len(wait_for(generated, "answer of the router", 120)) == 4
        print(f"\nthe router answers {time.monotonic() - killed:.0f} s after it was killed")
        # a server that is gone is left out, and taken back when it answers
        os.kill(endpoints.servers[0].pid, signal.SIGKILL)
        workers = wait_for(
            lambda: health(router, key) == [False, True] and health(router, key), "loss of a worker", 60
        )
        assert workers == [False, True]
        restarted(serve, "ready")
        wait_for(lambda: health(router, key) == [True, True], "return of the worker", 60)


def health(router, key):
    return sorted(worker["is_healthy"] for worker in call(router, "/workers", api_key=key)["workers"])
