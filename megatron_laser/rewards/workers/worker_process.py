"""The pool's side of one grading process: start, ask with a deadline, kill."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from megatron_laser.rewards.grade import GradingPoolError, RewardSpecError
from megatron_laser.rewards.workers.guard import TOO_MANY_PROCESSES
from megatron_laser.rewards.workers.messages import receive_message, send_message
from megatron_laser.rewards.workers.source_snapshot import SourceSnapshot
from megatron_laser.rewards.workers.user_code import place_in_dump

_GUARD_SECONDS = 2.0  # for the guard to kill what the grader has started, and end
_REAP_DEADLINE = 10.0  # seconds for the kernel to bury a killed process
_DUMP_SECONDS = 0.3  # for a hanging worker to say where it is


class WorkerTimeout(Exception):
    """The worker did not answer within the deadline, and was killed."""


class WorkerDied(Exception):
    """The worker's process ended while it held a request."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is told when it starts.

    Attributes:
        function: where the custom reward function is (`registry.locate_reward`); None for math_verify.
        memory_limit: bytes of address space that each of its processes may use, None for no limit.
        max_processes: that the functions may have started at once, None for no limit.
        rule: the fields of the `RewardRule`.
        needs: of `arguments.FACTS`, which the functions ask for; known when the first worker is ready.
        start_deadline: seconds until it must be ready.
        snapshot: the user's code as the first worker has read it.
    """

    function: str | None
    memory_limit: int | None
    start_deadline: float
    snapshot: SourceSnapshot = field(default_factory=SourceSnapshot)
    max_processes: int | None = None
    rule: dict[str, Any] = field(default_factory=dict)
    needs: set[str] = field(default_factory=set)


class WorkerProcess:
    """One grader and its guard (see `guard`). Used by a single thread, and started in it: the kernel ties the guard
    to its thread.

    Only `stop` may be called from another thread.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        """Start the process and wait until it is ready.

        Raises:
            RewardSpecError: the custom function cannot be imported or called; says where.
            GradingPoolError: it could not be started, or was late.
        """
        self._settings = settings
        self._asked = 0
        self._pid = 0
        deadline = time.monotonic() + settings.start_deadline
        self._process = self._start()
        function = settings.function
        try:
            hello = {
                "function": function,
                "memory_limit": settings.memory_limit,
                "rule": settings.rule,
                "sources": settings.snapshot.sources(),
            }
            send_message(self._connection, hello, deadline)
            reply = receive_message(self._connection, deadline)
        except TimeoutError as error:
            self.kill()
            raise GradingPoolError(
                f"a grading worker was not ready after {settings.start_deadline:g} s "
                f"(reward.function {function or 'math_verify'}): is importing it slow, or the machine busy?"
            ) from error
        except (EOFError, OSError) as error:
            ended = self._bury()
            if function is not None:
                raise RewardSpecError(
                    f"reward.function {function!r}: importing it ended the process of a grading worker ({ended}): "
                    "does the module call os._exit, or crash?"
                ) from error
            raise GradingPoolError(
                f"a grading worker ended while starting ({ended}); its error is on stderr"
            ) from error
        if "error" in reply:
            self.kill()
            if reply["spec"]:
                raise RewardSpecError(reply["error"])
            raise GradingPoolError(f"a grading worker could not prepare its function: {reply['error']}")
        self._pid = reply["pid"]
        settings.needs.update(reply["needs"])
        settings.snapshot.add(reply["sources"])

    @property
    def pid(self) -> int:
        """The grader's process id."""
        return self._pid

    def alive(self) -> bool:
        """Whether the grader runs."""
        if self._process.poll() is not None:
            return False
        # select() knows no file beyond number 1023, and a run with servers has many connections
        watch = select.poll()
        watch.register(self._connection, select.POLLIN)
        readable = watch.poll(0)
        try:
            return not readable or self._connection.recv(1, socket.MSG_PEEK) != b""
        except OSError:
            return False

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """The worker's reply; after an exception the process is dead.

        Args:
            deadline: seconds.

        Raises:
            WorkerTimeout, WorkerDied: with the place in the user's code where that is known.
        """
        until = time.monotonic() + deadline
        self._asked += 1
        try:
            send_message(self._connection, request | {"id": self._asked}, until)
            while True:
                reply = receive_message(self._connection, until)
                if reply.get("id") == self._asked:  # else written by a process that user code has forked
                    self._settings.snapshot.add(reply.get("sources", {}))
                    return reply
        except TimeoutError as error:
            place = self._place_now()
            self.kill()
            raise WorkerTimeout(f"no answer within {deadline:g} s{place}") from error
        except (EOFError, OSError, ValueError) as error:  # ValueError: its last words were cut off
            raise WorkerDied(self._bury()) from error

    def stop(self) -> None:
        """Ask for the end and return; whoever waits in `ask` gets WorkerDied."""
        self._process.terminate()

    def kill(self) -> None:
        """End the process and all that it has started, at once: the guard uses SIGKILL."""
        self._process.terminate()
        self._wait()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        # the child sees the same modules, whatever changed sys.path here; '' is the working directory
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with ExitStack() as ours, ExitStack() as theirs:
            try:
                connection, other = socket.socketpair()
                ours.callback(connection.close)
                theirs.callback(other.close)
                lifeline, own_end = os.pipe()
                ours.callback(os.close, own_end)
                theirs.callback(os.close, lifeline)
                dump = ours.enter_context(tempfile.TemporaryFile())
                passed = (other.fileno(), lifeline, dump.fileno())
                limit = self._settings.max_processes
                process = subprocess.Popen(
                    # -P: without the working directory, where a file may be called like a module of the library
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "megatron_laser.rewards.workers.worker_main",
                        *map(str, (*passed, -1 if limit is None else limit)),
                    ],
                    pass_fds=passed,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # prints of a custom function go to stderr, away from the run's output
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise GradingPoolError(f"a grading worker could not be started: {error}") from error
            self._connection, self._lifeline, self._dump = connection, own_end, dump
            ours.pop_all()
            return process

    def _bury(self) -> str:
        """How the process ended by itself; it is given a moment to have done so."""
        try:
            self._process.wait(_GUARD_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.terminate()
        place = self._last_dump(0)
        self._wait()
        code = self._process.returncode
        if code == TOO_MANY_PROCESSES and self._settings.max_processes is not None:
            return f"it had started more than {self._settings.max_processes} processes (reward.max_processes){place}"
        if code >= 0:
            return f"exit status {code}{place}"
        name = signal.Signals(-code).name
        hint = {"SIGKILL": ": was the memory used up?", "SIGTERM": ": by the reward function itself?"}.get(
            name, ""
        )
        return f"killed by {name}{hint}{place}"

    def _wait(self) -> None:
        """Until the guard has ended; what is left of its process group is killed after a while."""
        try:
            try:
                self._process.wait(_GUARD_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill_group()
                self._process.wait(_REAP_DEADLINE)
            if self._process.returncode == -signal.SIGKILL:  # it could not clean up itself
                self._kill_group()
        except subprocess.TimeoutExpired as error:
            raise GradingPoolError(
                f"grading worker {self._process.pid} is still there {_REAP_DEADLINE:g} s after SIGKILL"
            ) from error
        finally:
            self._close()

    def _kill_group(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _close(self) -> None:
        self._connection.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        self._dump.close()

    def _place_now(self) -> str:
        """Where the worker's threads are: " (file:line in function)", or "" where the user's code is not involved."""
        if self._settings.function is None or not self._pid:
            return ""
        before = os.fstat(self._dump.fileno()).st_size
        try:
            os.kill(self._pid, signal.SIGUSR1)  # worker.DUMP_SIGNAL
        except ProcessLookupError:
            return ""
        ends = time.monotonic() + _DUMP_SECONDS
        while not (place := self._last_dump(before)) and time.monotonic() < ends:
            time.sleep(0.01)
        return place

    def _last_dump(self, start: int) -> str:
        file = self._dump.fileno()
        place = place_in_dump(os.pread(file, 65536, start).decode("utf-8", "replace"))
        return f" ({place})" if place else ""
