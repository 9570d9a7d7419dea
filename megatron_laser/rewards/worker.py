"""One grading process: `python -m megatron_laser.rewards.worker FD PARENT_PID`, started by `WorkerProcess`.

It is executed afresh (never forked from the trainer, whose main module it does not import either), reads one
request after the other from its socket, and dies with the process that started it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from typing import Any

from . import math_grading
from .grade import as_grade
from .registry import RewardFunction, resolve_reward
from .wire import receive_message, send_message

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve requests until the pool closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's to handle
    _die_with_parent(int(sys.argv[2]))
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        function = _set_up(connection)
        while True:
            send_message(connection, _answer(receive_message(connection), function))
    except (EOFError, OSError):  # the pool is gone or has closed this worker
        os._exit(0)


def _set_up(connection: socket.socket) -> RewardFunction | None:
    """Take the settings, prepare the function, and report; the custom function is None for math_verify."""
    settings = receive_message(connection)
    function = None
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if settings["memory_limit"] is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (settings["memory_limit"], hard))
        if settings["function"] is None:
            math_grading.warm_up()
        else:
            function = resolve_reward(settings["function"])
    except BaseException as error:  # whatever user code raises at import, SystemExit included
        send_message(connection, {"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    send_message(connection, {"ready": True})
    return function


def _answer(request: dict[str, Any], function: RewardFunction | None) -> dict[str, Any]:
    first, second = request["texts"]
    try:
        if request["kind"] == "equal":
            return {"equal": math_grading.answers_equal(first, second)}
        if function is None:
            grade = math_grading.grade_extracted(first, second)
        else:
            grade = as_grade(function(first, second))
        return {"reward": grade.reward, "outcome": grade.outcome}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def _die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the pool's process ends; the socket's end covers other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request was in place
        os._exit(0)


if __name__ == "__main__":
    main()
