"""One server's place: what became of the process in it, as a pure state machine driven by a clock.

starting --answers--> ready | held      (held: paused until it gets the current weights)
starting, ready, held --dies, hangs, is late--> restarting --back-off over--> starting
restarting --too often--> failed
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_laser.rollout.endpoints import ServerState

MAX_RESTARTS = 5  # in WINDOW; one more and the slot is given up
WINDOW = 600.0  # seconds
_FIRST_DELAY = 1.0  # seconds before the first restart; doubles with every further one in WINDOW
_LONGEST_DELAY = 60.0


@dataclass(slots=True)
class Slot:
    """State of one place. Times are seconds of one monotonic clock.

    Attributes:
        name: for messages.
        start_deadline: a process may take so long until its first answer.
        hang_deadline: and so long between two answers after that.
        update_deadline: and so long while it is paused, since it may be loading weights.
        start: how often a process was started here.
        ever_answered: some process here has answered once.
        reason: why the last process ended.
        retry_at: when the next one starts, while `restarting`.
        paused: the process takes no requests, by its own word.
    """

    name: str
    start_deadline: float
    hang_deadline: float
    update_deadline: float = 0.0
    start: int = 0
    state: ServerState = "starting"
    ever_answered: bool = False
    reason: str = ""
    retry_at: float = 0.0
    paused: bool = False
    _started: float = 0.0
    _last_answer: float = 0.0
    _failures: list[float] = field(default_factory=list)

    @property
    def waits_to_start(self) -> bool:
        """No process is here, and one should be."""
        return self.state == "restarting" or (self.state == "starting" and self.start == 0)

    def age(self, now: float) -> float:
        """Seconds since the process was started."""
        return now - self._started

    def due(self, now: float) -> bool:
        """Whether it is time to start a process here."""
        return self.waits_to_start and now >= self.retry_at

    def started(self, now: float) -> None:
        """A process was started."""
        self.start += 1
        self.state = "starting"
        self.paused = False
        self._started = now

    def answered(self, now: float) -> bool:
        """The process has answered a probe that goes through its scheduler; True for its first answer."""
        first = self.state == "starting"
        self._last_answer = now
        if first:
            self.state = "ready"
            self.ever_answered = True
        return first

    def problem(self, now: float, ended: str | None) -> str | None:
        """What is wrong with the process; None: nothing.

        Args:
            ended: how it ended; None: it lives.
        """
        if self.waits_to_start or self.state == "failed":
            return None
        if ended is not None:
            return ended
        if self.state == "starting":
            late = self.age(now) > self.start_deadline
            return f"did not answer within start_deadline ({self.start_deadline:g} s)" if late else None
        silent, allowed, name = now - self._last_answer, self.hang_deadline, "hang_deadline"
        if self.paused and self.update_deadline > allowed:
            allowed, name = self.update_deadline, "it is paused for an update, and rollout.sync_deadline"
        if silent > allowed:
            return f"is alive but gave no answer for {silent:.0f} s ({name} is {allowed:g} s)"
        return None

    def failed(self, now: float, reason: str) -> None:
        """The process is gone: plan the next one, or give the slot up."""
        self.reason = reason
        self._failures = [time for time in self._failures if time > now - WINDOW] + [now]
        if len(self._failures) > MAX_RESTARTS:
            self.state = "failed"
            return
        self.state = "restarting"
        self.retry_at = now + min(_FIRST_DELAY * 2 ** (len(self._failures) - 1), _LONGEST_DELAY)

    @property
    def recent_restarts(self) -> int:
        """Failures inside the window, as counted at the last one."""
        return len(self._failures)
