"""One grading process: `python -m megatron_laser.rewards.workers.worker_main SOCKET LIFELINE DUMP`.

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
from typing import Any

from megatron_laser.rewards.answer_forms import MATHEMATICS, answer_form
from megatron_laser.rewards.grade import RewardSpecError, as_grade
from megatron_laser.rewards.mathematics import grading as math_grading
from megatron_laser.rewards.registry import RewardFunction, resolve_reward
from megatron_laser.rewards.workers.guard import fork_grader, move_high
from megatron_laser.rewards.workers.messages import receive_message, send_message
from megatron_laser.rewards.workers.source_snapshot import SourceKeeper
from megatron_laser.rewards.workers.user_code import definition, described

DUMP_SIGNAL = signal.SIGUSR1
"""Makes a worker write where each of its threads is."""


def main() -> None:
    """Serve requests until the pool closes the socket."""
    fork_grader(int(sys.argv[2]))
    dump = move_high(int(sys.argv[3]))
    faulthandler.enable(dump)  # the line of a segmentation fault
    faulthandler.register(DUMP_SIGNAL, dump)
    connection = socket.socket(fileno=move_high(int(sys.argv[1])))
    os.register_at_fork(after_in_child=connection.close)  # a child must not answer in the grader's place
    own = os.getpid()
    try:
        keeper, function = _set_up(connection)
        while True:
            request = receive_message(connection)
            reply = _answer(request, function)
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


def _set_up(connection: socket.socket) -> tuple[SourceKeeper, RewardFunction | None]:
    """Take the settings, prepare the function, and report; the custom function is None for math_verify."""
    settings = receive_message(connection)
    keeper = SourceKeeper(settings["sources"])
    function = None
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
            function = resolve_reward(settings["function"])
            if answer_form(settings["function"]) is not MATHEMATICS:  # a built-in one: its imports count here
                math_grading.warm_up()
    except BaseException as error:  # whatever user code raises at import, SystemExit included
        is_spec = isinstance(error, RewardSpecError)
        send_message(connection, {"error": str(error) if is_spec else described(error), "spec": is_spec})
        os._exit(1)
    send_message(connection, {"pid": os.getpid(), "sources": keeper.take_new()})
    return keeper, function


def _answer(request: dict[str, Any], function: RewardFunction | None) -> dict[str, Any]:
    first, second = request["texts"]
    try:
        if request["kind"] == "equal":
            return {"equal": math_grading.answers_equal(first, second)}
        if function is None:
            grade = math_grading.grade_extracted(first, second)
        else:
            grade = _checked(function, function(first, second))
        return {"reward": grade.reward, "outcome": grade.outcome}
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too: neither is a grade
        return {"error": described(error), "spent": _is_exhausted(error)}


def _checked(function: RewardFunction, value: object) -> Any:
    try:
        return as_grade(value)
    except (TypeError, ValueError) as error:
        place = definition(function)
        raise type(error)(f"{error}{f' ({place})' if place else ''}") from None


def _is_exhausted(error: BaseException) -> bool:
    """Whether this process has used up something that a new one has: memory, threads, files."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENOMEM, errno.EAGAIN)
    return isinstance(error, MemoryError) or "can't start new thread" in str(error)


if __name__ == "__main__":
    main()
