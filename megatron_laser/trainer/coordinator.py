"""Rank 0 works alone for a while (rollout, grading, evaluation); the others wait without an open collective.

A collective that is entered minutes before its last member arrives either times out or hides a dead rank.
So the others poll the rendezvous store: they see rank 0's heartbeat, its current phase, and its failure, and they
stop with a message when the heartbeat stops.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_BEAT_SECONDS = 1.0
_LONGEST_POLL = 0.5
_DONE = b"done"
_GO_ON = b"go on"
_KEPT_KEYS = 16


class Coordinator:
    """Runs phases on rank 0 while the other ranks wait; every wait has a deadline."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, deadline: float) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._alone = world_size == 1
        self._stop_reason: str | None = None
        self._deadline = deadline
        self._count = 0
        self._phase = "start"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if rank == 0 and not self._alone:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def lead(self, phase: str, work: Callable[[], T], *, deadline: float) -> T | None:
        """Run `work` on rank 0 and return its result there; the other ranks wait and return None.

        Args:
            phase: names the work in error messages.
            deadline: seconds that the others wait for the work as a whole.

        Raises:
            RuntimeError: on waiting ranks, when rank 0 failed, fell silent for `run.deadline` seconds, or took
                longer than `deadline`.
        """
        if self._alone:
            return work()
        key = f"phase/{self._count}"
        self._count += 1
        if self._rank != 0:
            self._wait(key, phase, deadline)
            return None
        self._phase = phase
        try:
            result = work()
        except BaseException as error:
            self._store.set(key, f"{type(error).__name__}: {error}")
            raise
        self._store.set(key, _DONE)
        if self._count > _KEPT_KEYS:
            self._store.delete_key(f"phase/{self._count - 1 - _KEPT_KEYS}")
        return result

    def request_stop(self, reason: str) -> None:
        """Note that this rank wants to stop; safe in a signal handler. See `agree_to_stop`."""
        self._stop_reason = reason

    def agree_to_stop(self, step: int) -> str | None:
        """Whether all ranks stop after `step`: the reason, the same on every rank, or None to go on.

        Call on every rank after every step. Rank 0 decides; every rank acknowledges a stop through the store
        before anybody saves, so that no collective of the save waits for a rank that is gone.

        Raises:
            RuntimeError: not all ranks acknowledged within `run.deadline`; nothing was saved.
        """
        if self._alone:
            return self._stop_reason
        if self._stop_reason is not None:
            self._store.set("stop_request", self._stop_reason)
        key = f"stop_decision/{step}"
        if self._rank == 0:
            asked = self._store.check(["stop_request"])
            self._store.set(key, self._store.get("stop_request") if asked else _GO_ON)
            self._store.delete_key(f"stop_decision/{step - _KEPT_KEYS}")
        else:
            self._wait_for(key, "agreeing whether to stop", self._deadline)
        decision = self._store.get(key)
        if decision == _GO_ON:
            return None
        self._store.set(f"stop_acknowledged/{self._rank}", _DONE)
        for rank in range(self._world_size):
            acknowledged = f"stop_acknowledged/{rank}"
            started = time.monotonic()
            while not self._store.check([acknowledged]):
                if time.monotonic() - started > self._deadline:
                    raise RuntimeError(
                        f"rank {self._rank}: rank {rank} did not acknowledge the stop after step {step} within "
                        f"run.deadline {self._deadline:g} s; nothing was saved, the last checkpoint is valid"
                    )
                time.sleep(0.01)
        return decision.decode()

    def close(self) -> None:
        """Stop the heartbeat."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * _BEAT_SECONDS)

    def _beat(self) -> None:
        beat = 0
        while not self._stop.is_set():
            beat += 1
            try:
                self._store.set("heartbeat", f"{beat} {self._phase}")
            except (RuntimeError, dist.DistError):
                return  # the store went away with the job
            self._stop.wait(_BEAT_SECONDS)

    def _wait(self, key: str, phase: str, deadline: float) -> None:
        self._wait_for(key, phase, deadline)
        outcome = self._store.get(key)
        if outcome != _DONE:
            raise RuntimeError(f"rank {self._rank}, phase {phase!r}: rank 0 failed with {outcome.decode()}")

    def _wait_for(self, key: str, phase: str, deadline: float) -> None:
        """Until the key is set by rank 0, watching its heartbeat."""
        started = last_change = time.monotonic()
        last_beat = b""
        where = f"rank {self._rank}, phase {phase!r}: rank 0"
        while True:
            try:
                if self._store.check([key]):
                    return
                beat = self._store.get("heartbeat") if self._store.check(["heartbeat"]) else b""
            except dist.DistNetworkError as error:
                raise RuntimeError(f"{where}, or the node that hosts its store, is gone: {error}") from error
            now = time.monotonic()
            if beat != last_beat:
                last_beat, last_change = beat, now
            if now - last_change > self._deadline:
                raise RuntimeError(
                    f"{where} gave no sign of life for {now - last_change:.0f} s (run.deadline is "
                    f"{self._deadline:g} s); its last message was {last_beat.decode()!r}"
                )
            if now - started > deadline:
                raise RuntimeError(
                    f"{where} is alive but did not finish within {deadline:g} s; raise the phase's deadline "
                    "(rollout.deadline for generation) if it is legitimately that slow"
                )
            # Short phases are noticed at once; in long ones hundreds of ranks must not crowd the store.
            time.sleep(min(_LONGEST_POLL, max(0.001, 0.02 * (now - started))))
