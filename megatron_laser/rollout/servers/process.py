"""A server's process and all that it starts: begun, looked at, ended to the last grandchild."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_laser.errors import UserError
from megatron_laser.rollout.servers import guard

_SCRIPT = str(Path(guard.__file__).resolve())
_REAP_DEADLINE = 10.0  # seconds for the kernel to bury a killed process


class ServeError(UserError, RuntimeError):
    """Servers could not be started or kept alive; the message names server, reason and log."""


class ChildProcess:
    """One process in a session of its own, killed by the kernel when this process ends."""

    def __init__(
        self, arguments: tuple[str, ...], environment: Mapping[str, str], *, log: Path, folder: Path
    ) -> None:
        """Start it; its output is appended to `log`, which only its owner can read.

        Raises:
            ServeError: it could not be started.
        """
        self.mark = environment[guard.MARK]
        self.log = log
        command = [sys.executable, "-I", "-S", _SCRIPT, "tie", str(os.getpid()), *arguments]
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "ab") as output:
                self._log_start = output.tell()
                self._process = subprocess.Popen(
                    command,
                    env=dict(environment),
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise ServeError(f"{arguments[0]} could not be started: {error}") from error

    @property
    def pid(self) -> int:
        """The process id, which is also that of its group."""
        return self._process.pid

    def ended(self) -> str | None:
        """How it ended, in words; None while it lives."""
        status = self._process.poll()
        if status is None:
            return None
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with exit status {status}"

    def terminate(self) -> None:
        """Ask it to end; `kill` must follow."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and everything that carries its mark, stopped processes included.

        Raises:
            ServeError: something is still there.
        """
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        left = guard.sweep(self.mark)
        try:
            self._process.wait(_REAP_DEADLINE)
        except subprocess.TimeoutExpired:
            left = [self.pid]
        if left:
            raise ServeError(
                f"processes {left} are still there after SIGKILL (waiting for a device or a file system?); end "
                "them before servers are started again"
            )

    def last_line(self) -> str:
        """The last line that it has written, shortened; "" if there is none."""
        lines = self.tail(1)
        return lines[0].split("] ", 1)[-1][:90] if lines else ""

    def tail(self, count: int) -> list[str]:
        """The last `count` lines that this process has written, empty ones left out."""
        return tail(self.log, count, start=self._log_start)


def tail(log: Path, count: int, *, start: int = 0) -> list[str]:
    """The last `count` lines of `log` behind byte `start`, empty ones left out; [] where it cannot be read."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - 65536))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    # a progress bar writes its line again and again
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    return [line for line in lines if line][-count:]


class Guard:
    """The watcher process that cleans up when this process is killed. It is told by the end of a pipe."""

    def __init__(self, mark: str, files: list[Path], keep_open: tuple[int, ...] = ()) -> None:
        """Start it.

        Args:
            mark: of all servers.
            files: what it removes.
            keep_open: descriptors that it holds until it is done, such as a lock.
        """
        self._command = [sys.executable, "-I", "-S", _SCRIPT, "watch", mark, *map(str, files)]
        self._keep_open = keep_open
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=self._keep_open
        )

    def ensure_alive(self) -> bool:
        """Start it again if somebody has ended it; True if so."""
        if self._process.poll() is None:
            return False
        self._process = self._start()
        return True

    def close(self) -> None:
        """Let it clean up and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_REAP_DEADLINE + 30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_REAP_DEADLINE)
