"""Rank 0 works alone for a while (rollout, grading, evaluation); the others wait without an open collective.

A collective that is entered minutes before its last member arrives either times out or hides a dead rank.
So the others poll the rendezvous store: they see rank 0's heartbeat, its current phase, and its failure, and they
stop with a message when the heartbeat stops. Phases with collectives are announced through `phase`: when one
fails there, its error says what every rank was doing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch.distributed as dist

from megatron_laser.distributed.heartbeat import Heartbeats

T = TypeVar("T")

_LONGEST_POLL = 0.5
_DONE = b"done"
_GO_ON = b"go on"
_KEPT_KEYS = 16
# Seconds in which the watchdog ends a rank that waits for a silent one, and says more.
_WATCHDOG_FIRST = 10.0
# Seconds that a failed rank 0 stays, with the store that it may host, for the others to hear of it.
HEARD_WITHIN = 5.0


class RankZeroFailed(RuntimeError):
    """Raised on waiting ranks: rank 0 failed, and says itself with what."""


class Coordinator:
    """Runs phases on rank 0 while the other ranks wait; every wait has a deadline."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        deadline: float,
        detail: Callable[[], str] | None = None,
        on_phase: Callable[[str], object] = lambda phase: None,
        on_stop: Callable[[str], object] = lambda reason: None,
    ) -> None:
        """
        Args:
            detail: what part of a phase runs right now, for the table of ranks.
            on_phase: called with each phase that this rank enters.
            on_stop: called, in the heartbeat's thread, with the reason when another rank was asked to stop.
        """
        self._on_phase = on_phase
        self._on_stop = on_stop
        self._doing = ""
        self._told = False
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._stop_reason: str | None = None
        self._window_request = 0
        self._window = 0
        self._deadline = deadline
        self._count = 0
        self._hearts: Heartbeats | None = None
        if world_size > 1:
            self._hearts = Heartbeats(
                store, rank, world_size, deadline=deadline, detail=detail, on_beat=self._pass_on
            )

    def start_watchdog(self) -> None:
        """End this process when another rank falls silent, even inside a collective that never returns."""
        if self._hearts is not None:
            self._hearts.watch()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """All ranks work together on `name`; an error of a collective gets the table of ranks as a note."""
        before = self._enter(name)
        try:
            yield
        except RuntimeError as error:
            told = isinstance(error, RankZeroFailed) or getattr(error, "__notes__", None)
            if self._hearts is not None and not told:
                error.add_note(f"rank {self._rank}, phase {name!r}; {self._hearts.table()}")
            raise
        self._enter(before)

    def run_on_rank_zero(self, phase: str, work: Callable[[], T], *, deadline: float) -> T | None:
        """Run `work` on rank 0 and return its result there; the other ranks wait and return None.

        Args:
            phase: names the work in error messages.
            deadline: seconds that the others wait for the work as a whole.

        Raises:
            RuntimeError: on waiting ranks, when rank 0 failed (RankZeroFailed), fell silent for `run.deadline`
                seconds, or took longer than `deadline`.
        """
        if self._hearts is None:
            before = self._enter(phase)
            result = work()
            self._enter(before)
            return result
        key = f"phase/{self._count}"
        self._count += 1
        if self._rank != 0:
            before = self._enter(f"waiting for rank 0: {phase}")
            self._wait_for(key, phase, deadline)
            outcome = self._store.get(key)
            if outcome != _DONE:
                self._store.set(f"{key}/heard/{self._rank}", _DONE)
                raise RankZeroFailed(
                    f"rank {self._rank}, phase {phase!r}: rank 0 failed with {outcome.decode()}"
                )
            self._enter(before)
            return None
        before = self._enter(phase)
        try:
            result = work()
        except BaseException as error:
            if self._stop_reason is not None and not isinstance(error, Exception):
                self.stop_told()  # that is no failure: they stop as well
                raise
            self._store.set(key, f"{type(error).__name__}: {error}")
            self._until_heard([f"{key}/heard/{rank}" for rank in range(1, self._world_size)])
            raise
        self._store.set(key, _DONE)
        if self._count > _KEPT_KEYS:
            self._store.delete_key(f"phase/{self._count - 1 - _KEPT_KEYS}")
        self._enter(before)
        return result

    def request_stop(self, reason: str) -> None:
        """Note that this rank wants to stop; safe in a signal handler. See `agree_to_stop`.

        The other ranks hear of it with their next heartbeat.
        """
        if self._stop_reason is None:
            self._stop_reason = reason
            if self._hearts is not None:
                self._hearts.soon()

    def stop_told(self) -> None:
        """Have all ranks hear, within seconds, that this one was asked to stop; it leaves then."""
        if self._hearts is None or self._stop_reason is None:
            return
        with suppress(RuntimeError):  # of a store that is gone
            self._pass_on(self._store)
            if self._rank == 0:
                self._store.set("start_decision", b"stop")
        self._until_heard([f"stop_heard/{rank}" for rank in range(self._world_size)])

    def agree_to_start(self) -> bool:
        """Whether all ranks have started and nobody was asked to stop; the same on every rank.

        Until a rank calls this it may leave by itself, after `stop_told`; from then on only all together do.

        Raises:
            RuntimeError: not all ranks came within `run.deadline`.
        """
        if self._hearts is None:
            return self._stop_reason is None
        before = self._enter("agreeing that all have started")
        self._store.set(f"started/{self._rank}", _DONE)
        if self._rank == 0:
            keys = [f"started/{rank}" for rank in range(self._world_size)]
            ends = time.monotonic() + self._deadline + _WATCHDOG_FIRST
            while not (stop := self._stop_reason is not None or self._store.check(["stop_request"])):
                if self._store.check(keys):
                    break
                if time.monotonic() > ends:
                    raise RuntimeError(
                        f"rank 0: not all ranks have started within run.deadline {self._deadline:g} s of it; "
                        f"{self._hearts.table()}"
                    )
                time.sleep(0.005)
            self._pass_on(self._store)
            self._store.set("start_decision", b"stop" if stop else _GO_ON)
        else:
            self._wait_for("start_decision", "agreeing that all have started", self._deadline)
        goes_on: bool = self._store.get("start_decision") == _GO_ON
        if not goes_on and self._store.check(["stop_request"]):
            self._on_stop(self._store.get("stop_request").decode())
        self._enter(before)
        return goes_on

    def request_window(self, steps: int) -> None:
        """Note that somebody asks for a window of so many steps (see `Windows`); safe in a signal handler."""
        self._window_request = steps

    def take_window(self) -> int:
        """The steps of a window that all ranks have agreed on in `agree_to_stop` since the last call; 0: none."""
        window, self._window = self._window, 0
        return window

    @property
    def doing(self) -> str:
        """The phase that this rank is in; "" where there is no other rank to tell."""
        return "" if self._hearts is None else self._hearts.phase

    def agree_to_stop(self, step: int) -> str | None:
        """Whether all ranks stop after `step`: the reason, the same on every rank, or None to go on.

        They also agree on a window that one of them was asked for; see `take_window`.

        Call on every rank after every step. Rank 0 decides; every rank acknowledges a stop through the store
        before anybody saves, so that no collective of the save waits for a rank that is gone.

        Raises:
            RuntimeError: not all ranks acknowledged within `run.deadline`; nothing was saved.
        """
        window, self._window_request = self._window_request, 0
        if self._hearts is None:
            self._window = window or self._window
            return self._stop_reason
        before = self._enter(f"agreeing whether to stop after step {step}")
        if self._stop_reason is not None:
            self._store.set("stop_request", self._stop_reason)
        if window:
            self._store.set("window_request", str(window))
        key = f"stop_decision/{step}"
        if self._rank == 0:
            asked = self._store.check(["stop_request"])
            self._store.set(key, self._store.get("stop_request") if asked else _GO_ON + self._asked_window())
            self._store.delete_key(f"stop_decision/{step - _KEPT_KEYS}")
        else:
            self._wait_for(key, "agreeing whether to stop", self._deadline)
        decision = self._store.get(key)
        goes_on = decision.startswith(_GO_ON)
        if goes_on:
            self._window = int(decision.removeprefix(_GO_ON) or 0) or self._window
        else:
            self._on_stop(decision.decode())
            self._acknowledge_stop(step)
        self._enter(before)
        return None if goes_on else decision.decode()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends with `error`. The watchdog stays on until the process ends."""
        if self._hearts is not None:
            try:
                self._hearts.fail(error)
            except RuntimeError:
                return  # the store is gone, and nobody is left to be told

    def close(self) -> None:
        """Leave the run: stop heartbeat and watchdog."""
        if self._hearts is not None:
            self._hearts.close()

    def _asked_window(self) -> bytes:
        """The steps of a window that any rank was asked for, once; empty for none."""
        if not self._store.check(["window_request"]):
            return b""
        asked = self._store.get("window_request")
        self._store.delete_key("window_request")
        return bytes(asked)

    def _enter(self, phase: str) -> str:
        """This rank begins `phase`; returns the one before."""
        before, self._doing = self._doing, phase
        if self._hearts is not None:
            before = self._hearts.enter(phase)
        self._on_phase(phase)
        return before

    def _pass_on(self, store: dist.Store) -> None:
        """With each heartbeat: tell the others of a request to stop, or hear of one."""
        if self._stop_reason is not None and not self._told:
            if not store.check(["stop_request"]):
                store.set("stop_request", self._stop_reason)
            store.set(f"stop_heard/{self._rank}", _DONE)
            self._told = True
        elif self._stop_reason is None and store.check(["stop_request"]):
            self._on_stop(store.get("stop_request").decode())

    def _until_heard(self, keys: list[str]) -> None:
        """Until all others know of it, if they come soon: else all they learn is that the store is gone."""
        until = time.monotonic() + min(HEARD_WITHIN, self._deadline)
        with suppress(RuntimeError):  # of a store that is gone: there is nobody left to be told
            while not self._store.check(keys) and time.monotonic() < until:
                time.sleep(0.02)

    def _acknowledge_stop(self, step: int) -> None:
        self._store.set(f"stop_acknowledged/{self._rank}", _DONE)
        started = time.monotonic()
        for rank in range(self._world_size):
            while not self._store.check([f"stop_acknowledged/{rank}"]):
                if time.monotonic() - started > self._deadline:
                    raise RuntimeError(
                        f"rank {self._rank}: rank {rank} did not acknowledge the stop after step {step} within "
                        f"run.deadline {self._deadline:g} s; nothing was saved, the last checkpoint is valid"
                    )
                time.sleep(0.01)

    def _wait_for(self, key: str, phase: str, deadline: float) -> None:
        """Until the key is set by rank 0, watching its heartbeat."""
        assert self._hearts is not None
        started = last_change = time.monotonic()
        last = None
        where = f"rank {self._rank}, phase {phase!r}: rank 0"
        while True:
            try:
                if self._store.check([key]):
                    return
                beat = self._hearts.latest(0)
            except dist.DistNetworkError as error:
                raise RuntimeError(f"{where}, or the node that hosts its store, is gone: {error}") from error
            now = time.monotonic()
            if beat != last:
                last, last_change = beat, now
            if now - last_change > self._deadline:
                doing = (
                    "nothing was ever heard of it" if last is None else f"its last phase was {last.phase!r}"
                )
                raise RuntimeError(
                    f"{where} gave no sign of life for {now - last_change:.0f} s (run.deadline is "
                    f"{self._deadline:g} s); {doing}"
                )
            if now - started > deadline:
                doing = "" if last is None else f" (it is at {last.where}, in phase {last.phase!r})"
                raise RuntimeError(
                    f"{where} is alive but did not finish within {deadline:g} s{doing}; raise the phase's "
                    "deadline (rollout.deadline for generation) if it is legitimately that slow"
                )
            # Short phases are noticed at once; in long ones hundreds of ranks must not crowd the store.
            time.sleep(min(_LONGEST_POLL, max(0.001, 0.02 * (now - started))))
