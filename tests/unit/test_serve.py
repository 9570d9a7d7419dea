"""`serve` from outside, with a fake in SGLang's place: what it publishes, starts again, and leaves behind."""

import contextlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.fake_sglang import fake_python
from helpers.serve_runs import write_run
from helpers.sglang_server import call, free_port
from helpers.torchrun import worker_environment

from megatron_laser.config import ConfigError, load_config
from megatron_laser.rollout.endpoints import EndpointsError, read_endpoints
from megatron_laser.rollout.servers import ServeError, ServeProcess, guard
from megatron_laser.rollout.servers.fleet_plan import (
    check_sglang,
    claim,
    plan_fleet,
)
from megatron_laser.rollout.servers.installed import ask_installed

PATIENCE = 60.0  # seconds; everything here takes a fraction of it on an idle machine


@contextlib.contextmanager
def serving(folder: Path, **sglang):
    serve = ServeProcess(load_config(write_run(folder, port=free_port(), **sglang)), folder / "serve")
    try:
        yield serve
    finally:
        serve.stop()


def wait_for(condition, what: str):
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(EndpointsError, OSError):
            found = condition()
            if found:
                return found
        assert time.monotonic() < until, f"no {what} within {PATIENCE:g} s"
        time.sleep(0.05)


def mark_of(pid: int) -> str:
    """What all processes of the serve carry that has started `pid`."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (entry,) = [entry.decode() for entry in entries if entry.startswith(f"{guard.MARK}=".encode())]
    return entry.split("=", 1)[1].split("/")[0]


def ask(endpoints, number: int, path: str, body=None):
    return call(endpoints.servers[number].url, path, body, api_key=endpoints.api_key, timeout=10)


def restarted(serve: ServeProcess, number: int, start: int, state: str):
    def look():
        found = read_endpoints(serve.endpoints)
        server = found.servers[number]
        return found if (server.start, server.state) == (start, state) else None

    return wait_for(look, f"server {number} in state {state} after start {start}")


def test_servers_and_router_are_published_and_end_with_serve(tmp_path):
    with serving(tmp_path, servers=2, router=True) as serve:
        endpoints = serve.wait_ready()
        first, second = endpoints.servers
        assert (first.start, second.start) == (1, 1)
        assert {server.torch_version for server in endpoints.servers} == {"2.13.0+cpu"}
        assert {server.nccl_settings["NCCL_CUMEM_ENABLE"] for server in endpoints.servers} == {"0"}
        assert len({first.url, second.url}) == 2
        router = read_endpoints(serve.endpoints).router_url
        wait_for(lambda: serve_workers(router, endpoints), "router")
        assert set(serve_workers(router, endpoints)) == {first.url, second.url}
        mark = mark_of(first.pid)
        assert len(guard.marked(mark)) == 7  # two servers with two children each, and the router
    assert guard.marked(mark) == []
    assert not serve.endpoints.exists()
    assert not list(serve.folder.rglob("server_*.yaml"))
    assert serve.last_words()[-1].endswith("all servers have ended")


def serve_workers(router, endpoints):
    reply = call(router, "/workers", api_key=endpoints.api_key, timeout=10)
    return [worker["url"] for worker in reply["workers"]]


@pytest.mark.slow
def test_a_killed_server_comes_back_and_is_held_until_it_has_the_current_weights(tmp_path):
    with serving(tmp_path, servers=2, hang_deadline=9) as serve:  # a probe every 1.5 s
        before = serve.wait_ready()
        os.kill(before.servers[0].pid, signal.SIGKILL)
        # nobody has changed weights yet: what the folder holds is current
        after = restarted(serve, 0, 2, "ready")
        assert after.servers[0].url == before.servers[0].url
        assert after.servers[0].pid != before.servers[0].pid
        assert after.servers[1] == before.servers[1]
        assert ask(after, 0, "/model_info")["paused"] is False
        assert [ask(after, number, "/model_info")["frozen"] for number in (0, 1)] == [1, 1]
        for number in (0, 1):
            ask(after, number, "/update_weights_from_disk", {"weight_version": "7"})
        time.sleep(3.0)  # serve sees the new version with its next probe
        os.kill(after.servers[1].pid, signal.SIGKILL)
        held = restarted(serve, 1, 2, "held")
        assert ask(held, 1, "/model_info")["paused"] is True
        ask(held, 1, "/update_weights_from_disk", {"weight_version": "7"})
        restarted(serve, 1, 2, "ready")
        assert any("was killed by SIGKILL; starts again" in line for line in serve.last_words())


def test_a_server_whose_scheduler_hangs_is_killed_and_started_again(tmp_path):
    with serving(tmp_path, hang_deadline=4) as serve:
        before = serve.wait_ready()
        scheduler = ask(before, 0, "/server_info")["scheduler_pid"]
        os.kill(scheduler, signal.SIGSTOP)
        after = restarted(serve, 0, 2, "ready")
        assert after.servers[0].pid != before.servers[0].pid
        assert not Path(f"/proc/{scheduler}/exe").exists()
        assert any("is alive but gave no answer for" in line for line in serve.last_words())


def test_a_router_that_is_gone_comes_back_under_its_address(tmp_path):
    with serving(tmp_path, router=True) as serve:
        endpoints = serve.wait_ready()
        router = read_endpoints(serve.endpoints).router_url
        wait_for(lambda: "answers for 1 of 1 servers" in " ".join(serve.last_words()), "router")
        (pid,) = guard.marked(f"{mark_of(endpoints.servers[0].pid)}/router")
        os.kill(pid, signal.SIGKILL)
        wait_for(
            lambda: "the router" in " ".join(serve.last_words(3)) and serve_workers(router, endpoints),
            "router",
        )
        assert read_endpoints(serve.endpoints).router_url == router


def test_killing_serve_leaves_no_orphan_and_no_file(tmp_path):
    with serving(tmp_path, servers=2) as serve:
        mark = mark_of(serve.wait_ready().servers[0].pid)
        os.kill(serve.pid, signal.SIGKILL)
        wait_for(lambda: not guard.marked(mark), "end of the servers")
        wait_for(lambda: not serve.endpoints.exists(), "removal of the endpoints")
        assert not list(serve.folder.rglob("server_*.yaml"))


def start_by_another(tmp_path, *options: str):
    """serve as the grandchild of this process; (its parent, its servers' mark, the endpoints file, its pid)."""
    file, endpoints = write_run(tmp_path, port=free_port()), tmp_path / "endpoints.json"
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'megatron_laser', 'serve', *sys.argv[1:]])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(file), "--endpoints", str(endpoints), *options],
        env=worker_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pid = int(parent.stdout.readline())
        ready = wait_for(
            lambda: [s for s in read_endpoints(endpoints).servers if s.state == "ready"], "server"
        )
        return parent, mark_of(ready[0].pid), endpoints, pid
    except BaseException:
        parent.kill()
        parent.wait()
        raise


def test_killing_whoever_started_serve_ends_it_and_its_servers(tmp_path):
    parent, mark, endpoints, _ = start_by_another(tmp_path)
    parent.kill()
    parent.wait()
    wait_for(lambda: not guard.marked(mark), "end of the servers")
    wait_for(lambda: not endpoints.exists(), "removal of the endpoints")


def test_serve_outlives_its_parent_when_it_is_told_to(tmp_path):
    parent, mark, endpoints, pid = start_by_another(tmp_path, "--outlive-parent")
    parent.kill()
    parent.wait()
    time.sleep(1.5)  # it looks four times a second
    assert guard.marked(mark) and endpoints.exists()
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not guard.marked(mark), "end of the servers")
    wait_for(lambda: not endpoints.exists(), "removal of the endpoints")


def test_a_server_that_does_not_come_up_ends_serve_with_the_end_of_its_log(tmp_path):
    with (
        serving(tmp_path, servers=2, options={"fake_exit": 3}) as serve,
        pytest.raises(ServeError, match="ended with exit status 3 before its first answer") as error,
    ):
        serve.wait_ready()
    assert "the fake server was told to end" in str(error.value)
    assert re.search(r"server_[01]\.log", str(error.value))  # whichever ended first


def test_a_server_that_never_answers_is_late_not_waited_for_forever(tmp_path):
    with (
        serving(tmp_path, options={"fake_silent": True}, start_deadline=3) as serve,
        pytest.raises(ServeError, match=r"did not answer within start_deadline \(3 s\)"),
    ):
        serve.wait_ready(PATIENCE)


def test_one_endpoints_file_belongs_to_one_serve(tmp_path):
    with claim(tmp_path / "endpoints.json"), pytest.raises(ConfigError, match="belongs to a serve that runs"):
        claim(tmp_path / "endpoints.json")
    claim(tmp_path / "endpoints.json").close()


def test_a_port_that_the_user_named_and_somebody_has_is_an_error_and_a_default_gives_way(
    tmp_path, monkeypatch
):
    from megatron_laser.rollout.servers import ports

    taken = {30000, 30001, 31000}
    monkeypatch.setattr(ports, "is_free", lambda host, port: port not in taken)
    named = load_config(write_run(tmp_path, port=31000))
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.port: 31000 on 127\.0\.0\.1 is in use"):
        plan_fleet(named, tmp_path / "endpoints.json")
    default = load_config(write_run(tmp_path, servers=2, router=True))
    plan = plan_fleet(default, tmp_path / "endpoints.json")
    assert (plan.router_port, plan.ports) == (30002, (30003, 30004))
    # and by whom, where that can be seen
    assert [remark.partition(" by ")[0] for remark in plan.remarks] == [
        "port 30000 is in use",
        "port 30001 is in use",
    ]


def test_a_port_with_a_listener_is_taken():
    import socket

    from megatron_laser.rollout.servers.ports import PortFinder, is_free

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()}"):
            PortFinder("127.0.0.1", port).take(exactly_first=True)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 is not an address of this machine"):
        is_free("192.0.2.1", 30000)


@pytest.mark.parametrize(
    ("version", "router_version", "message"),
    [
        ("-", "-", "has no SGLang"),
        ("0.5.9", "0.3.2", r"has SGLang 0\.5\.9, and 0\.5\.23 or newer is needed"),
        ("0.5.23", "-", "has no sglang-router"),
    ],
)
def test_an_unfit_environment_is_refused_before_anything_starts(tmp_path, version, router_version, message):
    with pytest.raises(ConfigError, match=message):
        check_sglang(fake_python(tmp_path, version, router_version), router=True)


def test_nccl_is_asked_for_only_where_it_matters(tmp_path):
    python = fake_python(tmp_path, torch_version="2.13.0", nccl_version="2.27.5")
    found = check_sglang(python, router=False, cuda=True)
    assert (found.sglang, found.torch, found.nccl) == ("0.5.23", "2.13.0", "2.27.5")
    assert check_sglang(python, router=False).nccl is None


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"torch_version": "2.14.1+cpu"}, r"torch 2\.14\.1\+cpu"),
        ({"torch_version": "2.14.1", "stand_ins": True}, "stand-ins of tools/setup_sglang_cpu"),
    ],
)
def test_an_environment_for_cpus_is_no_environment_for_gpus(tmp_path, environment, what):
    python = fake_python(tmp_path, **environment)
    with pytest.raises(ConfigError, match=rf"rollout\.sglang\.device: cuda, but .* is for CPUs \({what}"):
        check_sglang(python, router=False, cuda=True)
    assert check_sglang(python, router=False).sglang == "0.5.23"


def test_a_real_interpreter_says_what_it_has():
    found = ask_installed(sys.executable, nccl=False)
    assert found.torch == importlib.metadata.version("torch")
    assert found.nccl is None


def test_serve_says_what_is_wrong_with_the_run(tmp_path):
    from typer.testing import CliRunner

    from megatron_laser.cli import app

    file = write_run(tmp_path)
    result = CliRunner().invoke(app, ["serve", str(file), "rollout.engine=in_process"])
    assert result.exit_code == 2
    assert "error: " in result.output


def test_waiting_looks_where_the_servers_were_told_to_publish(tmp_path, monkeypatch):
    """`serve --endpoints FILE` and `serve --endpoints FILE --wait 1` belong together."""
    from typer.testing import CliRunner

    from megatron_laser.cli import app
    from megatron_laser.rollout.servers import launcher

    asked = []
    monkeypatch.setattr(
        launcher, "wait_for_servers", lambda config, nodes, say: asked.append((config, nodes))
    )
    file = write_run(tmp_path)
    found = tmp_path / "a: b.json"
    result = CliRunner().invoke(app, ["serve", str(file), "--endpoints", str(found), "--wait", "1"])
    assert result.exit_code == 0, result.output
    ((config, nodes),) = asked
    assert nodes == 1 and str(config.rollout.sglang.endpoints) == str(found)
