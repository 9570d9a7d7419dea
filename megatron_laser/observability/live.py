"""What a person sees of a running training: one live view, or plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, TextIO, cast

from rich.console import Console
from rich.live import Live

from megatron_laser.observability.extras import Output
from megatron_laser.observability.live_text import format_duration, plain_line
from megatron_laser.observability.live_view import HISTORY, ViewState, render

LiveMode = Literal["auto", "on", "off"]

_REFRESHES_PER_SECOND = 2.0
_SECONDS_BETWEEN_LINES = 2.0
_ETA_STEPS = 50  # recent steps whose pace the remaining time is estimated from
_EVALUATIONS = ("eval/", "test/")
_HISTORIES = ("reward_mean", "self_reward_f1")


class LiveView:
    """Shows a run's steps; use on rank 0, as a context manager.

    `update` only stores the step: drawing happens in rich's refresh thread, at most twice a second. Without a
    live view one line is printed for each step, or every two seconds where steps are faster, and always for
    the first step, the last one and those with an evaluation.
    """

    def __init__(
        self,
        total_steps: int,
        mode: LiveMode = "auto",
        *,
        title: str = "megatron_laser",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            total_steps: the run's last step.
            mode: auto = live view on a terminal, else lines; on = live view always; off = lines always.
            title: shown above the view.
            console: where to; default standard output, which may be closed or full: the view is off then.
            clock: seconds that never go back.

        Raises:
            ValueError: an unknown mode.
        """
        if mode not in ("auto", "on", "off"):
            raise ValueError(f"logging.live is {mode!r}; expected auto, on or off")
        self.console = console or Console(
            file=cast(TextIO, Output()), highlight=False, force_terminal=True if mode == "on" else None
        )
        live = mode == "on" or (mode == "auto" and self.console.is_terminal)
        self._clock = clock
        self._state = ViewState(title=title, total_steps=total_steps)
        self._times: deque[tuple[int, float]] = deque(maxlen=_ETA_STEPS + 1)
        self._last_line = -math.inf
        self._live: Live | None = None
        if live:
            self._live = Live(
                get_renderable=lambda: render(self._state, self.console),
                console=self.console,
                refresh_per_second=_REFRESHES_PER_SECOND,
            )

    def __enter__(self) -> LiveView:
        self._times.append((self._state.step, self._clock()))
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a finished step's metrics (names as in metrics.jsonl); what is missing is left out."""
        state, now = self._state, self._clock()
        if step == 0 or (state.step == 0 and step > 1):  # the initial model's evaluation; a resumed run
            self._times.clear()
        self._times.append((step, now))
        state.step = step
        state.metrics = dict(metrics)
        state.eta = self._seconds_left(step)
        state.evaluation |= {name: value for name, value in metrics.items() if name.startswith(_EVALUATIONS)}
        for name in _HISTORIES:
            value = metrics.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                state.history.setdefault(name, deque(maxlen=HISTORY)).append(float(value))
        if self._live is None:
            self._print_line(step, metrics, now)

    def message(self, text: str) -> None:
        """Print a line above the live view, or among the plain lines."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print_line(self, step: int, metrics: Mapping[str, Any], now: float) -> None:
        first_or_last = self._last_line == -math.inf or step >= self._state.total_steps
        evaluated = any(name.startswith(_EVALUATIONS) for name in metrics)
        if not (first_or_last or evaluated or now - self._last_line >= _SECONDS_BETWEEN_LINES):
            return
        self._last_line = now
        left = "" if self._state.eta is None else f"  eta {format_duration(self._state.eta)}"
        self.message(plain_line(step, self._state.total_steps, metrics) + left)

    def _seconds_left(self, step: int) -> float | None:
        """At the pace of the recent steps, evaluations included; None before there is a pace."""
        first_step, first_time = self._times[0]
        if step <= first_step:
            return None
        pace = (self._times[-1][1] - first_time) / (step - first_step)
        return max(0, self._state.total_steps - step) * pace
