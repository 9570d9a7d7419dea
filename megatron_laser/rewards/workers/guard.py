"""The process around one grader: whatever ends, nothing that the user's code has started is left.

The guard forks the grader and waits. It is the parent of every process that the grader leaves behind (a "subreaper"),
also of those in a session of their own, and kills them all when the grader has ended, when the pool asks (SIGTERM)
or when the pool's process is gone, however that was killed. It also passes on what the user's code prints, up to a
limit, so that a flood reaches neither the run's log nor a pipe that nobody reads; and where the number of processes is
limited, it counts them a few times a second and ends everything when there are more.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_OUTPUT_LIMIT = 16384  # bytes that one grader may print
_CHUNK = 4096  # PIPE_BUF: a pipe that is writable takes so much without blocking
_BURY_SECONDS = 5.0
_COUNT_SECONDS = 0.1  # between two looks at how many processes there are
TOO_MANY_PROCESSES = 213
"""The guard's exit status where it has ended a grader for them."""


def fork_grader(lifeline: int, max_processes: int | None = None) -> None:
    """Returns in the grader, a child of the calling process, which becomes its guard and never returns.

    Args:
        lifeline: the reading end of a pipe whose other end the pool has: it ends with the pool's process.
        max_processes: so many may there be below the grader at once; None: any number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's to handle
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    output, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(0)
        os.close(lifeline)
        os.dup2(theirs, 1)
        os.dup2(theirs, 2)
        os.close(theirs)
        os.close(output)
        return
    os.close(theirs)
    _Guard(child, lifeline, output, max_processes).run()


class _Guard:
    def __init__(self, child: int, lifeline: int, output: int, max_processes: int | None) -> None:
        self._max_processes = max_processes
        self._too_many = False
        self._child = child
        self._lifeline = lifeline
        self._output = output
        self._printed = 0
        self._status: int | None = None  # of the grader, as `waitpid` gives it
        self._asked: list[int] = []  # SIGTERM, when that came

    def run(self) -> NoReturn:
        try:
            self._close_what_is_the_grader_s()
            self._wait()
        finally:
            self._end()

    def _close_what_is_the_grader_s(self) -> None:
        keep = {0, 1, 2, self._lifeline, self._output}
        for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else range(3, 256):
            if int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    continue
        os.set_blocking(self._output, False)

    def _wait(self) -> None:
        """Until the grader has ended, the pool's process has, or the pool asks for the end."""
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: self._asked.append(number))
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # wakes `poll`
        poll = select.poll()
        for end in (self._lifeline, self._output, woken):
            poll.register(end, select.POLLIN)
        while not self._asked and not self._reap():
            limit = self._max_processes
            ready = {end for end, _ in poll.poll(None if limit is None else 1000 * _COUNT_SECONDS)}
            if limit is not None and len(_descendants()) - 1 > limit:  # the grader is one of them
                self._too_many = True
                return
            if woken in ready:
                os.read(woken, 512)
            if self._lifeline in ready:
                return
            if self._output in ready and not self._pass_on():
                poll.unregister(self._output)

    def _reap(self) -> bool:
        """Bury whoever has ended; whether the grader is among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return self._status is not None
            if pid == self._child:
                self._status = status

    def _pass_on(self) -> bool:
        """Write what was printed to stderr, as far as the limit goes; False at the end of it."""
        try:
            text = os.read(self._output, 65536)
        except BlockingIOError:
            return True
        if not text:
            return False
        left = _OUTPUT_LIMIT - self._printed
        self._printed += len(text)
        if left <= 0:
            return True
        if len(text) > left:
            text = text[:left] + b"\n(a reward function prints more than this; the rest is dropped)\n"
        for start in range(0, len(text), _CHUNK):
            if not select.select([], [2], [], 0)[1]:  # nobody reads it
                break
            os.write(2, text[start : start + _CHUNK])
        return True

    def _end(self) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            self._kill_all()
            while self._pass_on() and select.select([self._output], [], [], 0)[0]:
                pass
        finally:
            if self._too_many and not self._asked:
                os._exit(TOO_MANY_PROCESSES)
            _exit_like(self._asked[0] if self._asked else self._status)

    def _kill_all(self) -> None:
        """SIGKILL to every descendant: each that dies leaves its children to this process."""
        ends = time.monotonic() + _BURY_SECONDS
        while time.monotonic() < ends:
            for pid in _children():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self._reap()
            try:
                if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    time.sleep(0.002)
            except ChildProcessError:
                return


def _children() -> list[int]:
    """Process ids of this process's children; without /proc, none but those in its group can be found."""
    own = os.getpid()
    try:
        text = Path(f"/proc/self/task/{own}/children").read_text()
        return [int(pid) for pid in text.split()]
    except OSError:
        pass
    found = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            if entry.isdigit() and int(_stat(entry)[1]) == own:
                found.append(int(entry))
        except OSError:
            continue
    return found


def _descendants() -> list[int]:
    """Process ids of all that live below this process. Read at one moment after the other: some may be gone."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            if entry.isdigit():
                state, parent = _stat(entry)[:2]
                if state != "Z":
                    parents[int(entry)] = int(parent)
        except OSError:
            continue
    found = [os.getpid()]
    for pid in found:  # grows
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _stat(pid: str) -> list[str]:
    """State, parent, ... of /proc/PID/stat; the name before them may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _exit_like(status: int | None) -> NoReturn:
    """End as the grader did, so that the pool can say how."""
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        time.sleep(1.0)
    os._exit(0 if status is None else os.waitstatus_to_exitcode(status) & 0xFF)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value)


def move_high(fd: int, lowest: int = 200) -> int:
    """`fd` under a number that code which closes low ones leaves alone, and not inherited by what it starts."""
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EMFILE):
            raise
        os.set_inheritable(fd, False)
        return fd
    os.close(fd)
    return moved
