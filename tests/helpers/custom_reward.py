"""A reward function that does whatever a response says, and whether the processes that it leaves live."""

from __future__ import annotations

import time
from pathlib import Path

CUSTOM = '''
import os, sys, time

def act(response, answer):
    """Does what the response says."""
    if response == "hang":
        time.sleep(600)
    if response == "exit":
        os._exit(3)
    if response == "raise":
        raise RuntimeError("no such luck")
    if response == "segfault":
        import ctypes
        ctypes.string_at(0)
    if response == "recursion":
        return act(response, answer)
    if response == "leave":  # one child in the group, one in a session of its own
        import subprocess
        for new_session in (False, True):
            child = subprocess.Popen(["sleep", "600"], start_new_session=new_session)
            with open(answer, "a") as file:
                file.write(f"{child.pid} ")
        return 1
    if response == "leave and hang":
        act("leave", answer)
        time.sleep(600)
    if response == "fork":  # both sides return
        return 1 if os.fork() else 0.25
    if response == "close":
        os.closerange(3, 64)
        return 1
    if response == "kill parent":
        import signal
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
    if response == "flood":
        for _ in range(40):
            print("x" * 100_000)
        return 1
    if response == "files":
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        act.files = getattr(act, "files", [])
        while True:
            act.files.append(open("/dev/null"))
    if response == "torch":
        return float("torch" in sys.modules)
    if response == "memory":
        bytearray(64 << 30)
    if response == "count":
        act.calls = getattr(act, "calls", 0) + 1
        return act.calls / 100
    return {"text": "five", "nan": float("nan"), "none": None, "right": 1, "wrong": 0.0}[response]
'''


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: object, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False
