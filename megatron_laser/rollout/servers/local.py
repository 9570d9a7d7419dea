"""`serve` as a child of a run or a test: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

import megatron_laser
from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.rollout.endpoints import Endpoints, read_endpoints
from megatron_laser.rollout.servers.command import PYTHON_VARIABLE, child_environment
from megatron_laser.rollout.servers.process import ServeError, tail

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
