"""Runs the response's last ```python block with the tests of its row, in a process of its own.

reward:                    # in the YAML of a recipe beside this folder: paths start there
  function: ../rewards/code_execution.py:passes_tests
  deadline: 15            # of the grading worker: longer than SECONDS, or it is killed first
  max_processes: 8        # the program is one of them; null: no limit

The data has a column `tests`, Python with asserts (a list of such texts works, too). Right is a program that runs to
the end of all of them.

What the sandbox is: a Python of its own (-I) without this process's environment, in an empty folder that is deleted
afterwards; limits on CPU time, memory of each process, file size and open files; no network where the kernel lets a
process leave it (user namespaces; `NETWORK_OFF` says whether); killed with its process group at the deadline, and what
left the group ends with the grading worker (reward.max_processes counts it).

What it is not: a boundary against an attacker. The program runs as your user, reads every file that you can read, may
write where you may, and without namespaces reaches the network. It may also print or exit so that its tests seem to
pass: the token that has to be printed last only keeps `sys.exit(0)` from counting. Run untrusted models in a container.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_laser.rewards import Grade

SECONDS = 5.0  # for the program and its tests
MEMORY = 1 << 30  # bytes of address space, of each process
FILE_SIZE, OPEN_FILES, OUTPUT = 1 << 20, 64, 1 << 16
_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL)
_UNSHARE = ("unshare", "--user", "--map-current-user", "--net")


def _can_leave_the_network() -> bool:
    try:
        done = subprocess.run([*_UNSHARE, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


NETWORK_OFF = _can_leave_the_network()


def passes_tests(response: str, row: dict[str, Any]) -> Grade:
    """1 where the program passes, 0 where it fails, is late or is missing."""
    blocks = _BLOCK.findall(response)
    if not blocks:
        return Grade(0.0, "no_answer")
    tests = row["tests"]
    tests = tests if isinstance(tests, str) else "\n".join(tests)
    passed = run(blocks[-1], tests)
    return Grade(float(passed), "correct" if passed else "wrong")


def run(program: str, tests: str, seconds: float = SECONDS) -> bool:
    """Whether the program and then the tests run to their end within so many seconds.

    Raises OSError where no process can be started: that is not the program's fault, and becomes the outcome `crash`.
    """
    token = secrets.token_hex(16)  # printed behind the last test
    with tempfile.TemporaryDirectory(prefix="code_") as folder:
        file = Path(folder, "program.py")
        file.write_text(f"{program}\n\n{tests}\n\nprint({token!r}, flush=True)\n", encoding="utf-8")
        process = subprocess.Popen(
            [*(_UNSHARE if NETWORK_OFF else ()), sys.executable, "-I", "-B", str(file)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _limit(seconds),
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill(process)
    last = output[-OUTPUT:].decode("utf-8", "replace").strip().rpartition("\n")[2]
    return process.returncode == 0 and last == token


def _limit(seconds: float) -> None:
    """In the new process, before its program."""
    cpu = int(seconds) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
