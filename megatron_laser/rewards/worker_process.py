"""The pool's side of one grading process: start, ask with a deadline, kill."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from .grade import GradingPoolError
from .wire import receive_message, send_message

_REAP_DEADLINE = 10.0  # seconds for the kernel to bury a killed process


class WorkerTimeout(Exception):
    """The worker did not answer within the deadline, and was killed."""


class WorkerDied(Exception):
    """The worker's process ended while it held a request."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is told when it starts.

    Attributes:
        function: where the custom reward function is (`registry.reward_location`); None for math_verify.
        memory_limit: bytes of address space it may use, None for no limit.
        start_deadline: seconds until it must be ready.
    """

    function: str | None
    memory_limit: int | None
    start_deadline: float


class WorkerProcess:
    """One child process. Used by a single thread, and started in it: the kernel ties the child to its thread.

    Only `stop` may be called from another thread.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        """Start the process and wait until it is ready.

        Raises:
            GradingPoolError: it could not be started, failed to prepare its function, or was late.
        """
        deadline = time.monotonic() + settings.start_deadline
        self._connection, theirs = socket.socketpair()
        environment = dict(os.environ)
        # the child sees the same modules, whatever changed sys.path here; '' is the working directory
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [
            sys.executable,
            "-m",
            "megatron_laser.rewards.worker",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # prints of a custom function go to stderr, away from the run's output
                    env=environment,
                )
        except OSError as error:
            self._connection.close()
            raise GradingPoolError(f"a grading worker could not be started: {error}") from error
        try:
            hello = {"function": settings.function, "memory_limit": settings.memory_limit}
            send_message(self._connection, hello, deadline)
            reply = receive_message(self._connection, deadline)
        except TimeoutError as error:
            self.kill()
            raise GradingPoolError(
                f"a grading worker was not ready after {settings.start_deadline:g} s "
                f"(reward.function {settings.function or 'math_verify'}): "
                "is importing it slow, or the machine busy?"
            ) from error
        except (EOFError, OSError) as error:
            self.kill()
            raise GradingPoolError(
                f"a grading worker ended while starting (exit status {self._process.returncode}); "
                "its error is on stderr"
            ) from error
        if "error" in reply:
            self.kill()
            raise GradingPoolError(f"a grading worker could not prepare its function: {reply['error']}")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """The worker's reply; after an exception the process is dead.

        Args:
            deadline: seconds.

        Raises:
            WorkerTimeout, WorkerDied.
        """
        until = time.monotonic() + deadline
        try:
            send_message(self._connection, request, until)
            return receive_message(self._connection, until)
        except TimeoutError as error:
            self.kill()
            raise WorkerTimeout(f"no answer within {deadline:g} s") from error
        except (EOFError, OSError, ValueError) as error:  # ValueError: its last words were cut off
            self.kill()
            raise WorkerDied(f"exit status {self._process.returncode}") from error

    def stop(self) -> None:
        """Send SIGKILL and return; whoever waits in `ask` gets WorkerDied."""
        self._process.kill()

    def kill(self) -> None:
        """End the process at once and clean up; SIGKILL, since C code (a huge power) defers any other."""
        self._process.kill()
        try:
            self._process.wait(_REAP_DEADLINE)
        except subprocess.TimeoutExpired as error:
            raise GradingPoolError(
                f"grading worker {self.pid} is still there {_REAP_DEADLINE:g} s after SIGKILL"
            ) from error
        finally:
            self._connection.close()
