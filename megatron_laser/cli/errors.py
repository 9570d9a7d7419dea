"""A command's error becomes one readable message and exit status 2, or stays a crash; Ctrl-C one line, and 130."""

from __future__ import annotations

import errno
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from megatron_laser.errors import UserError

# What a user's path, permissions or disk can be wrong with. Anything else that the system refuses is a crash.
_FILE_ERRORS = frozenset(
    {
        *(
            errno.ENOENT,
            errno.EACCES,
            errno.EPERM,
            errno.EISDIR,
            errno.ENOTDIR,
            errno.ELOOP,
            errno.ENAMETOOLONG,
        ),
        *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOTEMPTY, errno.EEXIST),
    }
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
INTERRUPTED = 128 + signal.SIGINT
# What Ctrl-C leaves behind; `train` answers it by itself once it has begun.
_KEPT = {
    "train": "nothing was begun",
    "eval": "responses that had come are kept: the same command goes on with the rest",
    "verify": "verdicts that had come are kept: the same command goes on with the rest",
    "score": "scores are written once all are there: there are none",
    "calibrate": "nothing was written",
    "convert": "nothing was written: the target is as it was",
    "plan": "nothing was written",
    "bench": "what was measured stands above, and with --output in files that take it line by line",
    "serve": "servers that it had started have ended",
}


class user_errors:
    """Turn errors about the user's input into one readable message and exit status 2.

    several: asked whether the command is one that several processes run together, of which one is to speak. Alone
    a process always speaks, whatever launcher's variables it has inherited.
    command: asked for the command's name, when it is interrupted.
    """

    def __init__(
        self, several: Callable[[], bool] = lambda: False, command: Callable[[], str | None] = lambda: None
    ) -> None:
        self._several = several
        self._command = command

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            kept = _KEPT.get(self._command() or "", "what was complete by then stays")
            typer.echo(f"interrupted (SIGINT): {kept}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        if "megatron_laser.distributed.coordinator" in sys.modules:
            from megatron_laser.distributed.coordinator import HEARD_WITHIN, RankZeroFailed

            if isinstance(error, RankZeroFailed):
                # Rank 0 says what is wrong. It ends first, so that torchrun names it as the one that failed.
                time.sleep(HEARD_WITHIN + 1.0)
                raise typer.Exit(2) from None
        if isinstance(error, BaseException) and (message := user_message(error)):
            from megatron_laser.config.process_environment import is_main_process

            if self._several() and not is_main_process():
                time.sleep(3.0)  # the same error on every rank: rank 0 says it, and ends first
                raise typer.Exit(2) from None
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(2) from None


class Commands(TyperGroup):
    """The command line with `user_errors` around every command, those of groups within it too."""

    several = frozenset({"train"})
    """Commands that torchrun may start several times."""

    def invoke(self, ctx: Any) -> Any:
        with user_errors(lambda: ctx.invoked_subcommand in self.several, lambda: ctx.invoked_subcommand):
            return super().invoke(ctx)


def user_message(error: BaseException) -> str:
    """What to print for an error that the user can put right; "" for a crash."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _FILE_ERRORS and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _FULL:  # writing to an open file names none
        return (
            f"what the command prints cannot be written: {error.strerror}" if _printing(error) else str(error)
        )
    if isinstance(error, FileNotFoundError):
        return str(error)
    if isinstance(error, TimeoutError) and "megatron_laser.testtime" in sys.modules:
        return str(error)
    return ""


def _printing(error: BaseException) -> bool:
    """Whether typer's `echo` raised it: standard output, and no file of a run."""
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    return innermost is not None and innermost.tb_frame.f_code is typer.echo.__code__
