"""One place in which a command's error becomes one readable message and exit status 2, or stays a crash."""

from __future__ import annotations

import errno
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


class user_errors:
    """Turn errors about the user's input into one readable message and exit status 2.

    several: asked whether the command is one that several processes run together, of which one is to speak. Alone
    a process always speaks, whatever launcher's variables it has inherited.
    """

    def __init__(self, several: Callable[[], bool] = lambda: False) -> None:
        self._several = several

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
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
        with user_errors(lambda: ctx.invoked_subcommand in self.several):
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
