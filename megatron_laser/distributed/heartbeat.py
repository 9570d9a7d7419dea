"""Every rank's sign of life in the store, the table that explains a failure, and the watchdog.

A beat says what the rank's main thread does, for how long, and at which line. It is sent by a thread, so a rank
whose main thread hangs goes on beating, with a phase that grows old; a rank that was killed or stopped is silent.
Rank 0 watches all ranks and everybody watches rank 0, so the store sees a few requests per rank and second.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

BEAT_SECONDS = 1.0
EXIT_STATUS = 13  # of a rank that the watchdog ends
_OBSERVED_SECONDS = 2.5 * BEAT_SECONDS
# The main thread of a rank with a dead peer mostly gets an error of its own, which says more: it goes first.
_MAIN_THREAD_FIRST = 2.0 * BEAT_SECONDS
_FAILED_GRACE = 10.0
_LISTED = 16
_ALIVE, _LEFT = "alive", "left"
_PACKAGE = str(Path(__file__).parent.parent)


@dataclass(frozen=True)
class Beat:
    """One sign of life. seconds: how long the phase has lasted; sent: wall-clock time, for display only."""

    count: int
    phase: str
    seconds: float
    where: str
    sent: float
    state: str = _ALIVE


class Heartbeats:
    """Sends this rank's beats and reads the others'."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        deadline: float,
        detail: Callable[[], str] | None = None,
        on_beat: Callable[[dist.Store], object] = lambda store: None,
    ) -> None:
        """Start beating.

        Args:
            deadline: seconds of silence after which the watchdog gives a rank up.
            detail: what part of the phase runs, for the beat; called from the thread.
            on_beat: called from the thread with each beat, with its connection to the store.
        """
        self._on_beat = on_beat
        # A connection of its own: a client serves one blocking request at a time.
        self._store = store.clone()
        self._main_store = store
        self._rank, self._world_size = rank, world_size
        self._deadline = deadline
        self._detail = detail
        self._phase, self._since = "start", time.monotonic()
        self._count = 0
        self._state = _ALIVE
        self._abort: Callable[[str], None] | None = None
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its last count and when it was new here
        self._sending = threading.Lock()  # beats must reach the store in the order in which they were made
        self._stop = threading.Event()
        self._soon = threading.Event()
        self._checked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> str:
        """The main thread begins `phase`; returns the one before."""
        before = self._phase
        self._phase, self._since = phase, time.monotonic()
        # Said at once and from here: a rank that dies in the next moment is to be found in the right phase, and the
        # thread might not get to run before that.
        with contextlib.suppress(RuntimeError):  # of a store that is gone the next wait says more
            self._send(self._main_store)
        return before

    @property
    def phase(self) -> str:
        """What the main thread does."""
        return self._phase

    def watch(self, abort: Callable[[str], None] | None = None) -> None:
        """From now on end this process when another rank is silent for longer than the deadline.

        A collective over NCCL whose member is gone does not return, so the main thread cannot notice.

        Args:
            abort: called with the reason instead of ending the process.
        """
        self._seen.clear()
        self._abort = abort or end_process

    def soon(self) -> None:
        """Send the next beat now. Safe in a signal handler."""
        self._soon.set()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank failed; it goes on beating and watching until the process ends."""
        self._state = f"failed with {type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
        self._send(self._main_store)

    def close(self) -> None:
        """Leave: silence is no failure from now on. May be called twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._soon.set()
        self._thread.join(timeout=2 * BEAT_SECONDS)
        self._state = _LEFT
        self._send(self._main_store)

    def latest(self, rank: int) -> Beat | None:
        """The newest beat of `rank`; for the main thread."""
        return _read(self._main_store, rank)

    def table(self, store: dist.Store | None = None) -> str:
        """All ranks with their phases, the silent ones first; watches for a moment to see who is silent."""
        store = store or self._main_store
        try:
            first = [_read(store, rank) for rank in range(self._world_size)]
            time.sleep(_OBSERVED_SECONDS)
            second = [_read(store, rank) for rank in range(self._world_size)]
        except RuntimeError as error:  # DistError is one
            return f"no table of ranks: the store is gone ({error})"
        lines = [_line(rank, *pair, own=rank == self._rank) for rank, pair in enumerate(zip(first, second))]
        lines.sort(key=lambda line: line[0])
        text = [f"ranks as rank {self._rank} sees them:", *(f"  {line}" for _, line in lines[:_LISTED])]
        if len(lines) > _LISTED:
            text.append(f"  and {len(lines) - _LISTED} more")
        return "\n".join(text)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._send(self._store)
                self._on_beat(self._store)
                trouble = self._trouble() if self._abort is not None else None
            except RuntimeError as error:
                # At the end of a job the store may go first; close() ends this wait.
                if self._stop.wait(self._deadline) or self._abort is None:
                    return
                trouble = f"the store, or the node that hosts it, is gone: {error}"
            if trouble is not None and self._abort is not None and not self._stop.is_set():
                self._abort(trouble)
                return
            self._soon.wait(BEAT_SECONDS)
            self._soon.clear()

    def _send(self, store: dist.Store) -> None:
        detail = self._detail() if self._detail is not None else ""
        with self._sending:
            self._count += 1
            phase = f"{self._phase}: {detail}" if detail else self._phase
            seconds = time.monotonic() - self._since
            beat = Beat(self._count, phase, seconds, _main_thread_line(), time.time(), self._state)
            store.set(_key(self._rank), json.dumps(asdict(beat)))

    def _trouble(self) -> str | None:
        """Why this process must end, or None; looks once in a beat."""
        if time.monotonic() - self._checked < BEAT_SECONDS:
            return None
        self._checked = time.monotonic()
        if self._rank != 0 and self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        for rank in range(1, self._world_size) if self._rank == 0 else (0,):
            silent = self._silent_seconds(rank)
            if silent is None:
                continue
            text = (
                f"rank {rank} gave no sign of life for {silent:.0f} s (run.deadline is {self._deadline:g} s)"
            )
            beat = _read(self._store, rank)
            if beat is not None and beat.state != _ALIVE:
                text = f"rank {rank} {beat.state}, and this rank still waits {silent:.0f} s later"
            text = f"{text}\n{self.table(self._store)}"
            if self._rank == 0:
                self._store.set("verdict", text)
            return text
        return None

    def _silent_seconds(self, rank: int) -> float | None:
        """How long `rank` has been silent or failed, if that is too long."""
        beat = _read(self._store, rank)
        now = time.monotonic()
        if beat is not None and beat.state == _LEFT:
            return None
        failed = beat is not None and beat.state != _ALIVE
        count = -1 if failed else (0 if beat is None else beat.count)
        known, since = self._seen.get(rank, (None, now))
        if known != count:
            self._seen[rank] = (count, now)
            return None
        limit = min(self._deadline, _FAILED_GRACE) if failed else self._deadline + _MAIN_THREAD_FIRST
        return now - since if now - since > limit else None


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _read(store: dist.Store, rank: int) -> Beat | None:
    key = _key(rank)
    return Beat(**json.loads(store.get(key))) if store.check([key]) else None


def _line(rank: int, first: Beat | None, second: Beat | None, own: bool) -> tuple[int, str]:
    """(place in the table, text) of a rank whose beat was read twice."""
    if second is None:
        return 0, f"rank {rank}: never gave a sign of life"
    where = f", at {second.where}" if second.where else ""
    if second.state != _ALIVE:
        return 1, f"rank {rank}: {second.state}, phase {second.phase!r}"
    if first is not None and first.count == second.count and not own:
        silent = max(_OBSERVED_SECONDS, time.time() - second.sent)
        return 0, f"rank {rank}: no heartbeat for {silent:.0f} s, last phase {second.phase!r}{where}"
    return 2, f"rank {rank}: alive, in phase {second.phase!r} for {second.seconds:.0f} s{where}"


def _main_thread_line() -> str:
    """Where the main thread is: its innermost line in this package, or its innermost line."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    file = frame.f_code.co_filename.removeprefix(_PACKAGE + os.sep)
    return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"


def end_process(reason: str) -> None:
    """No teardown: it would wait for the rank that is gone."""
    os.write(2, f"watchdog of rank {os.environ.get('RANK', '0')}: {reason}\n".encode())
    os._exit(EXIT_STATUS)
