"""How a process of a run answers signals: at once in words, in its deeds as the phase allows.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 are one request: stop where it can be gone on from. Python runs a handler only
between two lines of the main thread, which may be inside a collective or an import for minutes; so a thread reads the
signals as they arrive (`signal.set_wakeup_fd`), says what happens, and ends the process where the main thread cannot.
A later SIGINT, SIGTERM or SIGHUP ends it at once. One Ctrl-C may arrive several times (of the terminal, and passed on
by launchers): what comes within two seconds is one. No torch: it answers before that is imported.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from megatron_laser.observability.best_effort import print_line

logger = logging.getLogger(__name__)

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
STOPPED_STATUS = 3
ONE_REQUEST = 2.0  # seconds
# Of a start that is to stop: what it may take to leave a call that Python cannot interrupt, and to take things apart.
_LEAVE_SECONDS = 5.0
_CLOSE_SECONDS = 30.0
_LOOK_SECONDS = 0.25
_POKE = signal.SIGUSR1  # to the main thread, so that it looks; never ends anything


class StopNow(BaseException):
    """Raised in the main thread where it may stop at once; no Exception, as KeyboardInterrupt is none."""


class StopSignals:
    """One process's requests to stop, and what they do.

    Attributes:
        reason: the first request's: a signal's name, or run.time_limit; "" while there is none.
        stopped: set by the run when it has stopped for it and can be continued.
        describe: what happens now, in words; asked when a request arrives.
        loses: what a process that ends at once loses, in words.
        say: takes a line for the user.
        last_word: called with exit status and reason before the process ends at once.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.stopped = False
        self.speaks = True
        self.describe: Callable[[], str] = lambda: "stopping at once: nothing has been trained yet"
        self.loses: Callable[[], str] = lambda: "nothing was trained since the start"
        self.say: Callable[[str], None] = print_line
        self.last_word: Callable[[int, str], None] = lambda status, reason: None
        self.started = time.monotonic()
        self._starting = True
        self._at = 0.0
        self._signalled: float | None = None  # when the first of those came that a second one ends
        self._said: set[str] = set()
        self._listeners: list[Callable[[str], object]] = []
        self._block: _Interruptible | None = None
        self._raised: float | None = None
        self._limit: tuple[float, str] | None = None
        self._main = threading.main_thread().ident or 0
        self._wake: int | None = None
        self._thread: threading.Thread | None = None

    @property
    def exit_status(self) -> int:
        """Of a process that has stopped: 3, or 0 under a launcher, which takes anything else for a failure."""
        return 0 if os.environ.get("RANK", "").strip() else STOPPED_STATUS

    def request(self, reason: str) -> None:
        """Ask to stop; the first reason counts. From any thread or signal handler."""
        if self.reason:
            return
        self._at = time.monotonic()
        self.reason = reason
        for listener in self._listeners:
            listener(reason)
        self._look_soon()

    def on_request(self, listener: Callable[[str], object]) -> None:
        """Call `listener` with the reason, at the latest now; perhaps in a signal handler, perhaps twice."""
        self._listeners.append(listener)
        if self.reason:
            listener(self.reason)

    def quiet(self) -> None:
        """Nobody listens any more, and what is said goes to standard output."""
        self._listeners = []
        self.say = print_line

    def forget(self, listener: Callable[[str], object]) -> None:
        """Undo `on_request`."""
        with suppress(ValueError):
            self._listeners.remove(listener)

    def interruptible(self, *, after: float = 0.0) -> _Interruptible:
        """Inside the block a request raises StopNow, `after` so many seconds of it; also one that came before."""
        return _Interruptible(self, after)

    def started_up(self, agree: Callable[[], bool] = lambda: True) -> None:
        """From now on there is something to save: nothing raises by itself.

        Args: agree: with the other ranks, that all have come so far and nobody was asked to stop.

        Raises:
            StopNow: it was asked to stop, or another rank was.
        """
        if threading.get_ident() == self._main:
            self.raise_if_due()
            self._block = None
        if not agree():
            self._raised = time.monotonic()
            raise StopNow(self.reason)
        self._starting = False

    def stops_with(self, error: BaseException) -> bool:
        """Whether `error` is how a start ends that was asked to stop, of which others' errors are consequences."""
        return isinstance(error, StopNow) or bool(self.reason and self._starting)

    def set_limit(self, at: float, reason: str) -> None:
        """Make the request by itself `at` a time by time.monotonic()."""
        self._limit = (at, reason)
        self._look_soon()

    def install(self) -> Callable[[], None]:
        """Take over the signals; returns what gives them back. Elsewhere than in the main thread it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        reading, self._wake = os.pipe()
        for end in (reading, self._wake):
            os.set_blocking(end, False)
        earlier = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        # nohup has SIGHUP ignored, and so it stays
        taken = [n for n in ASKING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in taken}
        closing = threading.Event()
        pid = os.getpid()
        self._thread = threading.Thread(
            target=self._watch, args=(reading, closing), name="stop signals", daemon=True
        )
        self._thread.start()
        start = self.interruptible()
        start.__enter__()

        def give_back() -> None:
            if os.getpid() != pid:
                return
            start.__exit__(None, None, None)
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(earlier)
            closing.set()
            self._look_soon()
            assert self._thread is not None
            self._thread.join()
            wake, self._wake = self._wake, None
            for end in (reading, wake):
                if end is not None:
                    os.close(end)

        return give_back

    def end_at_once(self, status: int, text: str) -> None:
        """The end of this process, without a word from the main thread; what it has started ends with it."""
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())
        try:
            self.last_word(status, text)
        finally:
            os._exit(status)

    def raise_if_due(self) -> None:
        """In the main thread: raise StopNow where that is allowed by now."""
        block = self._block
        if block is None or not self.reason or time.monotonic() < block.due(self._at):
            return
        self._block = None
        self._raised = time.monotonic()
        raise StopNow(self.reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal_counts(number):
            self.request(signal.Signals(number).name)
        self.raise_if_due()

    def _signal_counts(self, number: int) -> bool:
        """Whether it is no poke of our own, which comes only where there is a request already."""
        return number in ASKING and not (number == _POKE and self.reason)

    def _look_soon(self) -> None:
        wake = self._wake
        if wake is not None:
            with suppress(OSError):  # full: then it looks anyway
                os.write(wake, b"\0")

    def _watch(self, reading: int, closing: threading.Event) -> None:
        while True:
            pending = (self.reason or self._limit is not None) and not closing.is_set()
            ready, _, _ = select.select([reading], [], [], _LOOK_SECONDS if pending else None)
            arrived = os.read(reading, 4096) if ready else b""
            if closing.is_set():
                return
            for number in arrived:
                if number in ASKING:
                    self._arrived(signal.Signals(number))
            self._look()

    def _arrived(self, number: signal.Signals) -> None:
        if not self._signal_counts(number):
            return
        now = time.monotonic()
        self.request(number.name)
        if number == signal.SIGUSR1:  # a scheduler's warning, and no second thought of anybody
            return
        if self._signalled is None:
            self._signalled = now
            if self.reason != number.name and now - self._at > ONE_REQUEST:
                self.tell(
                    f"{number.name}: already stopping ({self.reason}): {self.describe()}; one more ends at once"
                )
        elif now - self._signalled > ONE_REQUEST:
            self.end_at_once(
                128 + number, f"{number.name} again: ended at once by a second signal; {self.loses()}"
            )

    def _look(self) -> None:
        now = time.monotonic()
        if self._limit is not None and now >= self._limit[0]:
            (_, reason), self._limit = self._limit, None
            self.request(reason)
        if not self.reason:
            return
        if "request" not in self._said:
            self._said.add("request")
            self.tell(f"{self.reason}: {self.describe()}; a second Ctrl-C or SIGTERM ends at once")
        block = self._block
        if block is not None and now >= block.due(self._at):
            with suppress(ProcessLookupError):
                signal.pthread_kill(self._main, _POKE)
        if self._starting and not self.stopped:
            stuck = self._raised is None and now > self._at + _LEAVE_SECONDS
            if stuck or (self._raised is not None and now > self._raised + _CLOSE_SECONDS):
                self.end_at_once(
                    self.exit_status, f"stopped ({self.reason}): {self.loses()}; the same command continues"
                )

    def tell(self, text: str) -> None:
        """One line for the user, from the process of the run that speaks."""
        if self.speaks:
            with suppress(Exception):  # of a terminal that is gone
                self.say(text)


class _Interruptible:
    """See `StopSignals.interruptible`. A class: its exit ends the block in its first line."""

    def __init__(self, signals: StopSignals, after: float) -> None:
        self._signals = signals
        self._after = after
        self._entered = 0.0
        self._outer: _Interruptible | None = None

    def due(self, requested: float) -> float:
        """When a request that was made at `requested` raises."""
        return max(requested, self._entered) + self._after

    def __enter__(self) -> None:
        self._entered = time.monotonic()
        self._outer = self._signals._block
        if threading.get_ident() == self._signals._main:
            self._signals._block = self
            self._signals.raise_if_due()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals._block = None if isinstance(error, StopNow) else self._outer


_active: StopSignals | None = None


@contextmanager
def answering_signals(*, speaks: bool = True) -> Iterator[StopSignals]:
    """Answer signals inside; within another such block it is that one's. StopNow ends here.

    Args: speaks: this process is the one of the run that says what happens.
    """
    global _active
    if _active is not None:
        yield _active
        return
    signals = StopSignals()
    signals.speaks = speaks
    give_back = signals.install()
    _active = signals
    try:
        yield signals
    except BaseException as error:
        if not signals.stops_with(error):
            raise
        signals.stopped = True
        signals.tell(f"stopped ({signals.reason}): {signals.loses()}; the same command starts it again")
    finally:
        _active = None
        give_back()
