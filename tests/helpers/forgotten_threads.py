"""Threads of process groups that nobody has any more.

A gloo group's threads end with its object, not with `destroy_process_group`, and each wakes up a hundred times a
second. What a test trained with holds groups in reference cycles, for which Python hardly ever looks in a process as
large as a worker of pytest: towards the end of a run thousands of threads would take the cores.
"""

import gc
import threading
from pathlib import Path

MOST = 200  # more than before
_left = 0


def threads() -> int:
    """Of this process, those of C++ too."""
    tasks = Path("/proc/self/task")
    return sum(1 for _ in tasks.iterdir()) if tasks.exists() else threading.active_count()


def end_forgotten_threads() -> None:
    """Look for cycles when there are `MOST` more threads than the last time left."""
    global _left
    if threads() > _left + MOST:
        gc.collect()
        _left = threads()
    _left = min(_left, threads())
