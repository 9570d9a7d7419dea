"""`run.time_limit`: whether one more step fits, by what steps, evaluations and saves of this start have taken."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_RECENT = 10  # steps
_MARGIN = 1.1
_CLOSING = 5.0  # seconds for the end of the process: servers, graders, files
_SAVING = ("saving ", "waiting for the last save")
_EVALUATING = ("evaluation after ", "first evaluation", "final evaluation")


class TimeLimit:
    """Seconds since `started` that a run may take; `enter` tells it of each phase as it begins."""

    def __init__(self, seconds: float, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ends = started + seconds
        self._clock = clock
        self._kind = "start"
        self._since = clock()
        self._spent = {"start": 0.0, "step": 0.0, "save": 0.0, "evaluation": 0.0}
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._save: float | None = None
        self._evaluation = 0.0

    def enter(self, phase: str) -> None:
        """A phase begins, named as in `Coordinator.phase`."""
        kind = "save" if phase.startswith(_SAVING) else "step"
        kind = "evaluation" if phase.startswith(_EVALUATING) else kind
        now = self._clock()
        self._spent[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def step_done(self, phase: str, *, steps: int = 1) -> None:
        """What was spent since the last call was one step; 0 of `steps`: what came before the first one."""
        self.enter(phase)
        if steps:
            self._steps.append(self._spent["step"])
        if self._spent["save"]:
            self.saved(self._spent["save"])
        self._evaluation = max(self._evaluation, self._spent["evaluation"])
        self._spent = dict.fromkeys(self._spent, 0.0)

    def saved(self, seconds: float) -> None:
        """A save took so long; one that is written in the background is told of when it is published."""
        self._save = max(self._save or 0.0, seconds)

    @property
    def save_seconds(self) -> float:
        """What a save takes: the longest one, or as long as the longest step where none was seen."""
        return self._save if self._save is not None else max(self._steps, default=0.0)

    def has_room(self, *, evaluation: bool) -> bool:
        """Whether another step fits, with its evaluation if one is due, and the save behind it."""
        needed = max(self._steps, default=0.0) + self.save_seconds + evaluation * self._evaluation
        return self._clock() + _MARGIN * needed + _CLOSING <= self._ends

    @property
    def latest_stop(self) -> float:
        """By the clock: when whatever runs must be cut off for the save to be done in time."""
        return self._ends - _MARGIN * self.save_seconds - _CLOSING
