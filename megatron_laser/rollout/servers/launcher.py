"""`serve` as a child of a run or a test: started, waited for, stopped; and waiting for `serve` of other nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import megatron_laser
from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.rollout.endpoints import Endpoints, merged, read_endpoints, read_parts
from megatron_laser.rollout.servers.command import PYTHON_VARIABLE, child_environment
from megatron_laser.rollout.servers.process import ServeError, tail

_OTHERS_POLL = 0.5  # seconds
_PROGRESS = 30.0  # seconds between two lines
_OLD = (
    120.0  # seconds after which a file is of a serve that ended with its node: others write it again every 30
)

_POLL = 0.2  # seconds
_STOP_DEADLINE = 60.0  # seconds until a serve that does not end is killed; its watcher then ends the servers


class ServeProcess:
    """`megatron-laser serve` in a process of its own. It and its servers end with this process, however that ends.

    endpoints: the file that it publishes.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Start it.

        Args:
            config: the run; rollout.sglang says what to start.
            folder: for its files; made if it is missing.

        Raises:
            ServeError: it could not be started.
        """
        self.folder = folder.absolute()
        self.endpoints = self.folder / "endpoints.json"
        self.log = self.folder / "serve.log"
        settings: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / "serve.yaml"
            file.write_text(yaml.safe_dump(settings), encoding="utf-8")
            with self.log.open("ab") as output:
                self._log_start = output.tell()
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "megatron_laser",
                        "serve",
                        str(file),
                        "--endpoints",
                        str(self.endpoints),
                    ],
                    env=_environment(config),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is the run's to handle
                )
        except OSError as error:
            raise ServeError(f"serve could not be started in {self.folder}: {error}") from error
        self._deadline = config.rollout.sglang.start_deadline

    @property
    def pid(self) -> int:
        """The process id of serve itself."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether serve runs."""
        return self._process.poll() is None

    def wait_ready(self, deadline: float | None = None) -> Endpoints:
        """Wait until all servers answer.

        Args:
            deadline: seconds; None: rollout.sglang.start_deadline.

        Raises:
            ServeError: serve has ended (its last words are in the message), or the deadline has passed.
        """
        deadline = self._deadline if deadline is None else deadline
        until = time.monotonic() + deadline
        while True:
            if not self.alive():
                raise ServeError(
                    f"serve ended with exit status {self._process.returncode}; the end of {self.log}:\n  "
                    + "\n  ".join(self.last_words())
                )
            with contextlib.suppress(ConfigError):
                found = read_endpoints(self.endpoints)
                if all(server.state == "ready" for server in found.servers):
                    return found
            if time.monotonic() > until:
                raise ServeError(
                    f"the servers did not answer within {deadline:g} s (rollout.sglang.start_deadline); the end of "
                    f"{self.log}:\n  " + "\n  ".join(self.last_words())
                )
            time.sleep(_POLL)

    def last_words(self, count: int = 30) -> list[str]:
        """The end of its log."""
        return tail(self.log, count, start=self._log_start)

    def stop(self) -> None:
        """End it and all servers; safe to call twice.

        Raises:
            ServeError: it had to be killed, and is still there.
        """
        if self.alive():
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        try:
            self._process.wait(_STOP_DEADLINE)
        except subprocess.TimeoutExpired as error:
            raise ServeError(f"serve (process {self.pid}) is still there after SIGKILL") from error


def _environment(config: RunConfig) -> dict[str, str]:
    """This process's, without torchrun's; this package importable, the API key's variable kept."""
    child = child_environment(os.environ, python="", mark="")
    for name in ("MEGATRON_LASER_SERVE", "PYTHONSAFEPATH"):
        child.pop(name, None)
    for name in (config.rollout.sglang.api_key_env, PYTHON_VARIABLE):
        if name in os.environ:
            child[name] = os.environ[name]
    package = str(Path(megatron_laser.__file__).resolve().parents[1])
    child["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return child


def wait_for_servers(config: RunConfig, nodes: int, say: Callable[[str], None]) -> None:
    """Return when all servers of `nodes` nodes answer. Files that nobody writes again do not count.

    Args:
        config: the run; rollout.sglang.endpoints is where they publish.
        nodes: how many `serve` processes there are.
        say: prints one line for the user.

    Raises:
        ConfigError: rollout.sglang.endpoints is not set.
        ServeError: they did not answer within rollout.sglang.start_deadline.
    """
    sglang = config.rollout.sglang
    if sglang.endpoints is None:
        raise ConfigError(
            [
                "rollout.sglang.endpoints (or --endpoints): required by --wait, which looks for the servers there"
            ]
        )
    needed, started, said = nodes * sglang.servers, time.monotonic(), 0.0
    first: dict[Path, float] = {}
    while True:
        try:
            parts = read_parts(sglang.endpoints)
            merged(sglang.endpoints, parts)  # the run will read it so
            old = [
                file for file, part in parts.items() if _is_old(part, first.setdefault(file, part.updated))
            ]
            fresh = [part for file, part in parts.items() if file not in old]
            states = [server.state for part in fresh for server in part.servers]
            seen = f"{states.count('ready')} of {needed} servers answer" + "".join(
                f"; {file} was last written {time.time() - parts[file].updated:.0f} s ago by its node's clock and does "
                "not count: delete it if that node serves no longer"
                for file in old
            )
            if states.count("ready") >= needed:
                say(f"{seen}, after {time.monotonic() - started:.0f} s")
                return
        except ConfigError as error:
            seen = error.problems[0]
        waited = time.monotonic() - started
        if waited > sglang.start_deadline:
            raise ServeError(
                f"after {waited:.0f} s (rollout.sglang.start_deadline): {seen}; look at the output of serve on the "
                f"rollout nodes, and at the logs beside {sglang.endpoints}"
            )
        if waited - said >= _PROGRESS:
            said = waited
            say(f"waiting for servers since {waited:.0f} s: {seen}")
        time.sleep(_OTHERS_POLL)


def _is_old(part: Endpoints, first_seen: float) -> bool:
    """Whether a file lies there since a while; one that was written again while we wait is not, whatever its clock."""
    return part.updated == first_seen and abs(time.time() - part.updated) > _OLD
