"""Several worker processes behind one queue: every request ends, whatever becomes of the process that had it.

Not pebble: its pool imports the caller's main module (torch) into every worker, breaks for good when an idle
worker is killed, and takes deadlines from the wall clock. Here each worker has a socket and a parent thread
of its own, so nothing is shared that a dying worker could leave locked.
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from typing import Any

from megatron_laser.rewards.grade import GradingPoolError, RewardSpecError
from megatron_laser.rewards.workers.worker_process import (
    WorkerDied,
    WorkerProcess,
    WorkerSettings,
    WorkerTimeout,
)

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 3
_CLOSED = "the grading pool is closed"
_Task = tuple[dict[str, Any], "Future[dict[str, Any]]"]


class WorkerQueue:
    """Hands requests to worker processes and replaces the workers that a request has cost."""

    def __init__(self, workers: int, deadline: float, settings: WorkerSettings) -> None:
        """Start the workers and wait until all are ready.

        Args:
            workers: number of processes.
            deadline: seconds for one request, from when a worker gets it.

        Raises:
            GradingPoolError, RewardSpecError: a worker did not become ready; says why.
        """
        self._deadline = deadline
        self._settings = settings
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._processes: dict[int, WorkerProcess] = {}  # thread index -> the process it looks after
        started: list[Future[None]] = [Future() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(index, ready), name=f"grading-{index}", daemon=True)
            for index, ready in enumerate(started)
        ]
        try:
            for thread, ready in zip(self._threads, started, strict=True):
                thread.start()
                if settings.function is not None and thread is self._threads[0]:
                    ready.result()  # the others run the code that it has read
            for ready in started:
                ready.result()  # ends: the start has its deadline
        except BaseException:
            self.close()
            raise

    def submit(self, request: dict[str, Any]) -> Future[dict[str, Any]]:
        """Queue a request (see `worker`); the future gives the reply or raises one of

        WorkerTimeout: no reply within the deadline. WorkerDied: the process ended meanwhile.
        GradingPoolError: the pool was closed, or a new worker could not be started.

        Raises:
            GradingPoolError: the pool is closed.
        """
        future: Future[dict[str, Any]] = Future()
        with self._lock:  # so that nothing is queued behind the end marks of `close`
            if self._closed:
                raise GradingPoolError(_CLOSED)
            self._tasks.put((request, future))
        return future

    def queued(self) -> int:
        """Requests that no worker has taken yet."""
        return self._tasks.qsize()

    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        with self._lock:
            return [process.pid for process in self._processes.values() if process.alive()]

    def close(self) -> None:
        """Kill the workers; requests that are not finished raise GradingPoolError. May be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._tasks.put(None)
            processes = list(self._processes.values())
        for process in processes:
            process.stop()
        for thread in self._threads:
            if thread.ident is None:  # never started: the first worker failed
                continue
            thread.join(2 * self._settings.start_deadline)  # at worst it is starting a worker

    def _serve(self, index: int, ready: Future[None]) -> None:
        """One thread: owns one process at a time, and starts it (see `worker_process`)."""
        process: WorkerProcess | None = None
        try:
            process = self._start(index)
        except Exception as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        while (task := self._tasks.get()) is not None:
            request, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if process is None or not process.alive():  # it was killed while idle
                    process = self._restart(index, process)
                reply = process.ask(request, self._deadline)
            except Exception as error:
                future.set_exception(GradingPoolError(_CLOSED) if self._closed else error)
                lost = isinstance(error, (WorkerTimeout, WorkerDied))
                process = self._replace(index) if lost else None
                continue
            future.set_result(reply)
            if reply.get("spent"):  # out of memory, threads or files: a new process has them again
                process = self._replace(index, process)
        if process is not None:
            process.kill()

    def _start(self, index: int) -> WorkerProcess:
        if self._closed:
            raise GradingPoolError(_CLOSED)
        process = WorkerProcess(self._settings)
        with self._lock:
            if not self._closed:
                self._processes[index] = process
                return process
        process.kill()
        raise GradingPoolError(_CLOSED)

    def _restart(self, index: int, dead: WorkerProcess | None) -> WorkerProcess:
        if dead is not None:
            dead.kill()
        for _ in range(_START_ATTEMPTS - 1):
            try:
                return self._start(index)
            except (GradingPoolError, RewardSpecError) as error:
                logger.error("restarting a grading worker failed: %s", error)
        return self._start(index)

    def _replace(self, index: int, spent: WorkerProcess | None = None) -> WorkerProcess | None:
        """A new worker before the next request needs it; None leaves a failure to that request."""
        try:
            if spent is not None:
                spent.kill()
            return None if self._closed else self._start(index)
        except (GradingPoolError, RewardSpecError) as error:
            if not self._closed:  # closed while it started
                logger.error("replacing a grading worker failed: %s", error)
            return None
