"""What keeps servers from outliving `serve`: a script of the standard library alone, run beside the package.

    guard.py tie PARENT COMMAND...     become COMMAND, tied to process PARENT: the kernel kills it when that ends
    guard.py watch MARK [FILE...]      wait for the end of standard input, then kill all that carry MARK, remove FILEs

A server has children of its own (scheduler, detokenizer). They too carry the mark, an environment variable that
processes inherit; the watcher finds them by it, however they were started and whoever was killed before.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

MARK = "MEGATRON_LASER_SERVE"  # environment variable: SERVE_ID/SLOT
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SWEEP_DEADLINE = 30.0  # seconds for killed processes to vanish
_PAUSE = 0.1  # seconds between two looks


def tie(parent: int, command: list[str]) -> None:
    """Replace this process by `command`; SIGKILL reaches it when `parent`'s starting thread ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error}", file=sys.stderr)
        os._exit(127)


def marked(mark: str) -> list[int]:
    """Live processes whose environment has MEGATRON_LASER_SERVE at `mark`, or at a slot of it (`mark`/...)."""
    exact, slot = f"{MARK}={mark}".encode(), f"{MARK}={mark}/".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                entries = file.read().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if any(entry == exact or entry.startswith(slot) for entry in entries):
            found.append(int(name))
    return found


def sweep(mark: str, deadline: float = _SWEEP_DEADLINE) -> list[int]:
    """Kill all that carry `mark` until none is left; returns those still there after `deadline` seconds."""
    until = time.monotonic() + deadline
    empty = 0
    while True:
        left = marked(mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        # twice: a process can be started between the look and the kill of the one that starts it
        empty = 0 if left else empty + 1
        if empty == 2 or time.monotonic() > until:
            return left
        time.sleep(_PAUSE)


def watch(mark: str, files: list[str]) -> None:
    """Wait until the writer of standard input is gone, then clean up after it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        continue
    sweep(mark)
    for file in files:
        with contextlib.suppress(OSError):
            os.unlink(file)


if __name__ == "__main__":
    if sys.argv[1] == "tie":
        tie(int(sys.argv[2]), sys.argv[3:])
    else:
        watch(sys.argv[2], sys.argv[3:])
