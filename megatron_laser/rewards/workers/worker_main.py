"""One grading process: `python -m megatron_laser.rewards.workers.worker_main SOCKET LIFELINE DUMP PROCESSES`.

`WorkerProcess` starts it. It is executed afresh (never forked from the trainer, whose main module it does not import
either), puts a guard around itself (see `guard`) and reads one request after the other from its socket.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import resource
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any

from megatron_laser.rewards.grade import RewardSpecError
from megatron_laser.rewards.mathematics import grading as math_grading
from megatron_laser.rewards.workers.grader import Grader
from megatron_laser.rewards.workers.guard import fork_grader, move_high
from megatron_laser.rewards.workers.messages import receive_message, send_message
from megatron_laser.rewards.workers.source_snapshot import SourceKeeper
from megatron_laser.rewards.workers.user_code import described

DUMP_SIGNAL = signal.SIGUSR1
"""Makes a worker write where each of its threads is."""


def main() -> None:
    """Serve requests until the pool closes the socket."""
    limit = int(sys.argv[4])
    fork_grader(int(sys.argv[2]), None if limit < 0 else limit)
    dump = move_high(int(sys.argv[3]))
    faulthandler.enable(dump)  # the line of a segmentation fault
    faulthandler.register(DUMP_SIGNAL, dump)
    connection = socket.socket(fileno=move_high(int(sys.argv[1])))
    os.register_at_fork(after_in_child=connection.close)  # a child must not answer in the grader's place
    own = os.getpid()
    try:
        keeper, grader = _set_up(connection)
        while True:
            request = receive_message(connection)
            reply = _answer(request, grader)
            if os.getpid() != own:  # the user's code has forked, and this is the child, come back
                os._exit(0)
            send_message(connection, reply | {"id": request["id"], "sources": keeper.take_new()})
    except (
        EOFError,
        OSError,
    ) as error:  # the pool is gone, has closed this worker, or user code has closed the socket
        if getattr(error, "errno", None) == errno.EBADF:
            os.write(2, b"a reward function has closed file descriptors that are not its own\n")
            os._exit(1)
        os._exit(0)


def _set_up(connection: socket.socket) -> tuple[SourceKeeper, Grader | None]:
    """Take the settings, prepare the functions, and report; None for math_verify alone."""
    settings = receive_message(connection)
    keeper = SourceKeeper(settings["sources"])
    grader = None
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if settings["memory_limit"] is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (settings["memory_limit"], hard))
        if settings["function"] is None:
            math_grading.warm_up()
            if math_grading.grade_extracted(r"\frac{7}{14}", "0.5").reward != 1.0:
                raise RuntimeError(
                    r"math-verify says that \frac{7}{14} is not 0.5: is its parser installed in the version that it "
                    "asks for (pip check)?"
                )
        else:
            keeper.install()
            grader = Grader(settings["function"], settings["rule"])
    except BaseException as error:  # whatever user code raises at import, SystemExit included
        is_spec = isinstance(error, RewardSpecError)
        send_message(connection, {"error": str(error) if is_spec else described(error), "spec": is_spec})
        os._exit(1)
    needs = sorted(grader.needs) if grader else []
    send_message(connection, {"pid": os.getpid(), "sources": keeper.take_new(), "needs": needs})
    return keeper, grader


def _answer(request: dict[str, Any], grader: Grader | None) -> dict[str, Any]:
    first, second = request["texts"]
    try:
        if request["kind"] == "equal":
            return {"equal": math_grading.answers_equal(first, second)}
        if grader is None:
            grade = math_grading.grade_extracted(first, second)
            return {"grade": {"reward": grade.reward, "outcome": grade.outcome}}
        return {"grade": asdict(grader.grade(first, second, request.get("facts", {})))}
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too: neither is a grade
        text = described(error)
        return {"error": text, "spent": _is_exhausted(error, text)}


def _is_exhausted(error: BaseException, text: str) -> bool:
    """Whether this process has used up something that a new one has: memory, threads, files. text: `described`."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENOMEM, errno.EAGAIN)
    return isinstance(error, MemoryError) or "can't start new thread" in text


if __name__ == "__main__":
    main()
