"""A real SGLang server on the CPU for tests: one is shared, since each takes half a minute to start."""

import contextlib
import json
import os
import subprocess
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.source_tree import ROOT
from helpers.tiny_run import write_tiny_run
from megatron_laser.config import RunConfig, load_config
from megatron_laser.rollout.endpoints import EndpointsError, read_endpoints
from megatron_laser.rollout.servers import ServeError, ServeProcess, guard

START_DEADLINE = 280.0  # seconds; 20 on an idle machine
# A port is taken only once a server has imported everything: each worker of pytest-xdist, and each test session on this
# machine, looks for free ones in a hundred of its own, below those that the kernel gives to clients.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
_SESSION = int(os.environ.get("PYTEST_XDIST_TESTRUNUID") or f"{os.getpid():x}", 16) % 30
_FIRST_PORT = 20000 + _SESSION * 400 + _WORKER * 100
_GIVEN: deque[int] = deque(maxlen=25)


@dataclass(frozen=True)
class SharedServer:
    """A running server of the model of `write_tiny_run`: vocabulary of 28, EOS 1, 64 positions, fp32, random.

    A test leaves it as it found it: not paused, no update session open. Weights may have been changed by others.
    """

    url: str
    api_key: str | None
    model: Path  # the folder of the model, its tokenizer, data and run.yaml
    run_file: Path  # run.yaml, with rollout.engine: sglang
    endpoints: Path  # what `serve` publishes
    pid: int
    serve_pid: int

    @property
    def pids(self) -> list[int]:
        """The server, its scheduler, detokenizer, and whatever else it has started."""
        return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]

    def call(self, path: str, body: dict[str, Any] | None = None, *, timeout: float = 60.0) -> Any:
        """The JSON reply to a GET, or to a POST of `body`."""
        return call(self.url, path, body, api_key=self.api_key, timeout=timeout)


def call(
    url: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    api_key: str | None = None,
    timeout: float = 60.0,
) -> Any:
    """The JSON reply to a GET, or to a POST of `body`; raises urllib.error.HTTPError for statuses from 400."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=timeout) as reply:
        text = reply.read()
    return json.loads(text) if text.strip() else None


@cache
def _found_python() -> tuple[str | None, str]:
    """The interpreter, or why there is none."""
    given = os.environ.get("MEGATRON_LASER_SGLANG_PYTHON")
    python = given or str(ROOT / ".venv-sglang" / "bin" / "python")
    if not Path(python).exists():
        wanted = "MEGATRON_LASER_SGLANG_PYTHON" if given else "tools/setup_sglang_cpu.sh has not been run"
        return None, f"no SGLang environment: {python} does not exist ({wanted})"
    script = "import importlib.metadata as m; print(m.version('sglang'))"
    done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        return None, f"no SGLang environment: {python} has no sglang; run tools/setup_sglang_cpu.sh"
    return python, ""


def sglang_python() -> str:
    """The interpreter of the SGLang environment; skips the calling test with the reason where there is none."""
    python, reason = _found_python()
    if python is None:
        pytest.skip(reason)
    return python


def serve_config(folder: Path, *overrides: str, family: str = "qwen2", **rollout: Any) -> RunConfig:
    """A tiny run whose rollouts come from SGLang servers on this machine's CPU, written to `folder`/run.yaml.

    Args:
        family: of `write_tiny_run`'s model.
        rollout: further settings of the section; `sglang` is merged into the defaults.
    """
    sglang: dict[str, Any] = {
        "python": sglang_python(),
        "device": "cpu",
        "start_deadline": START_DEADLINE,
        "hang_deadline": 100,
        "options": {"log_level": "info", "random_seed": 0},
    }
    sglang |= rollout.pop("sglang", {})
    file = write_tiny_run(folder, family=family, rollout={"engine": "sglang", "sglang": sglang, **rollout})
    return load_config(file, [f"rollout.sglang.port={free_port()}", *overrides])


def free_port() -> int:
    """A port on loopback that nobody listens on, and that no other worker of this test session is given.

    Nor this one soon again: who was given it may not listen yet.
    """
    from megatron_laser.rollout.servers.ports import PortFinder

    ports = PortFinder("127.0.0.1", _FIRST_PORT)
    while (port := ports.take()) in _GIVEN:
        pass
    _GIVEN.append(port)
    return port


@dataclass(frozen=True)
class RunningRouter:
    """A router in front of a server."""

    url: str
    metrics_url: str

    def generated(self) -> int:
        """Requests for generation that it has passed on."""
        with urllib.request.urlopen(self.metrics_url, timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        counts = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("smg_router_requests_total{")]
        return sum(int(count) for count in counts)


@contextlib.contextmanager
def router_before(server: SharedServer, log: Path) -> Iterator[RunningRouter]:
    """Start sglang-router before the server, as `serve` would, and end it; it writes to `log`."""
    from megatron_laser.rollout.servers.command import router_command
    from megatron_laser.rollout.servers.ports import PortFinder

    ports = PortFinder("127.0.0.1", _FIRST_PORT + 50)
    router = RunningRouter(f"http://127.0.0.1:{ports.take()}", f"http://127.0.0.1:{ports.take()}/metrics")
    command = router_command(
        load_config(server.run_file),
        python=sglang_python(),
        port=int(router.url.rsplit(":", 1)[1]),
        metrics_port=int(router.metrics_url.rsplit(":", 1)[1].split("/")[0]),
        workers=[server.url],
        api_key=server.api_key,
        mark="test",
        environment=os.environ,
    )
    with log.open("w") as file:
        process = subprocess.Popen(
            command.arguments, env=command.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        until = time.monotonic() + START_DEADLINE
        while not _has_worker(router, server):
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"the router has no worker: {log.read_text()[-2000:]}", pytrace=False)
            time.sleep(0.2)
        yield router
    finally:
        process.kill()
        process.wait()


def _has_worker(router: RunningRouter, server: SharedServer) -> bool:
    try:
        found = call(router.url, "/workers", api_key=server.api_key, timeout=10)["workers"]
    except OSError:
        return False
    return any(worker["is_healthy"] for worker in found)


@contextlib.contextmanager
def shared_server(folder: Path, *overrides: str, family: str = "qwen2") -> Iterator[SharedServer]:
    """Start one server on the tiny model by the project's own `serve`, and end it."""
    config = serve_config(folder / "run", *overrides, family=family)
    started = time.monotonic()
    serve = ServeProcess(config, folder / "serve")
    try:
        try:
            endpoints = serve.wait_ready()
        except ServeError as error:
            pytest.fail(f"the shared SGLang server did not start: {error}", pytrace=False)
        print(f"\nSGLang server: {time.monotonic() - started:.0f} s")
        (server,) = read_endpoints(serve.endpoints).servers
        assert server.pid is not None
        yield SharedServer(
            url=server.url,
            api_key=endpoints.api_key,
            model=folder / "run",
            run_file=folder / "run" / "run.yaml",
            endpoints=serve.endpoints,
            pid=server.pid,
            serve_pid=serve.pid,
        )
    finally:
        serve.stop()


def wait_for(condition: Callable[[], Any], what: str, deadline: float = START_DEADLINE) -> Any:
    """The first true value of `condition`, which may fail while servers come and go; fails after `deadline` seconds."""
    until = time.monotonic() + deadline
    while True:
        with contextlib.suppress(EndpointsError, OSError, psutil.Error):
            found = condition()
            if found:
                return found
        assert time.monotonic() < until, f"no {what} within {deadline:g} s"
        time.sleep(0.1)


def mark_of(pid: int) -> str:
    """What all processes of the `serve` that started `pid` carry."""
    return psutil.Process(pid).environ()[guard.MARK].split("/")[0]
