"""A stand-in for the interpreter of SGLang's environment, for faults that are hard to provoke in a real server.

It answers the few questions that `serve` asks, keeps its scheduler in a child process that can be stopped, and a
further child in a session of its own, which no process group reaches. Standard library and yaml only.

    fake_python(folder) writes the executable; rollout.sglang.options then steers it:
        fake_exit: N       print a line and end with status N
        fake_silent: true  live, but never listen
        fake_warm_up: N    it is ready N seconds after it listens
"""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

VERSION = "0.5.23"


def fake_python(
    folder: Path,
    version: str = VERSION,
    router_version: str = "0.3.2",
    torch_version: str = "2.13.0+cpu",
    nccl_version: str = "-",
    stand_ins: bool = False,
) -> str:
    """An executable in `folder` that behaves as a python with SGLang where `serve` is concerned."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "python"
    file.write_text(
        f'#!/bin/sh\nFAKE_VERSIONS="{version} {router_version} {torch_version} {nccl_version} '
        f'{"stand-ins" if stand_ins else "-"}" '
        f'exec {sys.executable} -S {__file__} "$@"\n'
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def scheduler() -> None:
    """Echo lines; stopped or killed, it leaves its server without answers."""
    for line in sys.stdin:
        print(line.strip(), flush=True)


class Server:
    def __init__(self, arguments: list[str]) -> None:
        # JSON is YAML, but not the other way round: the settings are flat, which is enough
        lines = Path(option(arguments, "--config")).read_text().splitlines()
        self.settings = dict(line.split(": ", 1) for line in lines if ": " in line)
        self.key = self.settings.get("api-key")
        self.version, self.paused, self.lock = "default", False, threading.Lock()
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

    def answer(self, path: str, body: dict) -> dict | None:
        if path == "/server_info":
            with self.lock:
                self.scheduler.stdin.write("?\n")
                self.scheduler.stdin.flush()
                self.scheduler.stdout.readline()
            return {"version": VERSION, "scheduler_pid": self.scheduler.pid}
        if path == "/model_info":
            return {
                "weight_version": self.version,
                "paused": self.paused,
                "frozen": self.frozen,
                "paused_in_warm_up": self.paused_in_warm_up,
            }
        if path == "/ready":
            return {} if self.warm() and not self.paused else None
        if path == "/freeze_gc":
            self.frozen += 1
        elif path == "/pause_generation":
            self.paused = True
            self.paused_in_warm_up |= not self.warm()
        elif path == "/continue_generation":
            self.paused = False
        elif path == "/update_weights_from_disk":
            with self.lock:  # the scheduler answers nothing meanwhile
                time.sleep(body.get("fake_seconds", 0))
            self.version = body["weight_version"]
        else:
            return None
        return {"status": "ok"}

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
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            allowed = served.key is None or self.headers.get("Authorization") == f"Bearer {served.key}"
            reply = served.answer(self.path, body) if allowed else None
            missing = 503 if self.path == "/ready" else 404
            self.send_response(401 if not allowed else missing if reply is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(reply or {}).encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return None

    ThreadingHTTPServer((host, port), Handler).serve_forever()


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
