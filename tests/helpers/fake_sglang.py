"""A stand-in for the interpreter of SGLang's environment, for faults that are hard to provoke in a real server.

It answers the few questions that `serve` asks, keeps its scheduler in a child process that can be stopped, and a
further child in a session of its own, which no process group reaches. Standard library and yaml only.

    fake_python(folder) writes the executable; rollout.sglang.options then steers it:
        fake_exit: N       print a line and end with status N
        fake_silent: true  live, but never listen
        fake_warm_up: N    it is ready N seconds after it listens
"""

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, with nothing installed

from helpers.executables import write_executable
from helpers.fake_server import SGLANG_VERSION, ServerState
from helpers.plain_http import HttpServer, respond


def fake_python(
    folder: Path,
    version: str = SGLANG_VERSION,
    router_version: str = "0.3.2",
    torch_version: str = "2.13.0+cpu",
    nccl_version: str = "-",
    stand_ins: bool = False,
) -> str:
    """An executable in `folder` that behaves as a python with SGLang where `serve` is concerned."""
    stands_in = "stand-ins" if stand_ins else "-"
    return write_executable(
        folder / "python",
        f'FAKE_VERSIONS="{version} {router_version} {torch_version} {nccl_version} {stands_in}" '
        f'exec {sys.executable} -S {__file__} "$@"',
    )


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def scheduler() -> None:
    """Echo lines; stopped or killed, it leaves its server without answers."""
    for line in sys.stdin:
        print(line.strip(), flush=True)


class Server(ServerState):
    def __init__(self, arguments: list[str]) -> None:
        # JSON is YAML, but not the other way round: the settings are flat, which is enough
        lines = Path(option(arguments, "--config")).read_text().splitlines()
        self.settings = dict(line.split(": ", 1) for line in lines if ": " in line)
        self.key = self.settings.get("api-key")
        super().__init__()
        self.lock = threading.Lock()
        self.frozen = 0
        self.ready_at = time.monotonic() + float(self.settings.get("fake-warm-up", 0))
        self.paused_in_warm_up = False
        if "fake-exit" in self.settings:
            print("the fake server was told to end", flush=True)
            sys.exit(int(self.settings["fake-exit"]))
        me = [sys.executable, "-S", __file__]
        self.scheduler = subprocess.Popen(
            [*me, "scheduler"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        subprocess.Popen([*me, "sleep"], start_new_session=True)
        if "fake-silent" in self.settings:
            time.sleep(600)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/server_info":
            with self.lock:
                self.scheduler.stdin.write("?\n")
                self.scheduler.stdin.flush()
                self.scheduler.stdout.readline()
            self.info = {"scheduler_pid": self.scheduler.pid}
        elif path == "/ready":
            return {} if self.warm() and not self.paused else None
        elif path == "/freeze_gc":
            self.frozen += 1
            return {"status": "ok"}
        elif path == "/pause_generation":
            self.paused_in_warm_up |= not self.warm()
        elif path == "/update_weights_from_disk":
            with self.lock:  # the scheduler answers nothing meanwhile
                time.sleep(body.get("fake_seconds", 0))
        found = super().answer(path, body)
        if path == "/model_info":
            own = ("paused", "frozen", "paused_in_warm_up")
            found |= {name: getattr(self, name) for name in own}
        return found

    def warm(self) -> bool:
        return time.monotonic() >= self.ready_at


class Router:
    def __init__(self, arguments: list[str]) -> None:
        self.key = os.environ.get("MEGATRON_LASER_ROUTER_KEY")
        urls = arguments[arguments.index("--worker-urls") + 1 :]
        self.workers = [url for url in urls if url.startswith("http")]

    def answer(self, path: str, body: dict) -> dict | None:
        if path != "/workers":
            return None
        if body:
            self.workers.append(body["url"])
        return {"workers": [{"url": url, "is_healthy": True} for url in self.workers]}


def serve(served: Server | Router, host: str, port: int) -> None:
    def handle(handler: BaseHTTPRequestHandler, path: str, body: dict[str, Any]) -> None:
        allowed = served.key is None or handler.headers.get("Authorization") == f"Bearer {served.key}"
        reply = served.answer(path, body) if allowed else None
        missing = 503 if path == "/ready" else 404
        respond(handler, 401 if not allowed else missing if reply is None else 200, reply or {})

    HttpServer(handle, host, port).serve_forever()


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["scheduler"]:
        scheduler()
    elif arguments[:1] == ["sleep"]:
        time.sleep(600)
    elif arguments[:1] == ["-c"] and "importlib.metadata" in arguments[1]:
        versions = os.environ["FAKE_VERSIONS"].split()
        if arguments[2:] != ["nccl"]:  # as the real script: NCCL's is looked up only when asked for
            versions[3] = "-"
        print("\n".join(versions))
    else:
        kind = Router if arguments[:1] == ["-c"] else Server
        serve(kind(arguments), option(arguments, "--host"), int(option(arguments, "--port")))


if __name__ == "__main__":
    main(sys.argv[1:])
