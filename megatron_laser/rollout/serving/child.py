"""`megatron-laser serve` as a child of the training run: for runs that bring their own servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_laser.rollout.sglang.errors import ServersLost

_STOP_SECONDS = 30.0
_SHOWN_LINES = 15


class ServeChild:
    """Servers started by this process. They end with it, however it ends: `serve` watches its parent."""

    def __init__(self, config: Path, endpoints: Path, *, log: Path) -> None:
        """
        Args:
            config: the run's YAML; `rollout.sglang` says what to start.
            endpoints: file that the child publishes.
            log: where its output goes.
        """
        self.endpoints = endpoints
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        endpoints.unlink(missing_ok=True)  # of an earlier run: its servers are gone
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "megatron_laser",
                    "serve",
                    str(config),
                    "--endpoints",
                    str(endpoints),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the run, which ends its servers in order
            )

    def check(self) -> None:
        """Raises ServersLost, with the end of its log, when the child has ended."""
        status = self._process.poll()
        if status is not None:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
            raise ServersLost(
                f"`megatron-laser serve` ended with status {status}; the end of {self._log}:\n"
                + "\n".join(lines)
            )

    def stop(self) -> None:
        """End the child and its servers; safe to call twice."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
