"""What a person sees of a running training: one live view, or plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, TextIO, cast

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_laser.observability.alarms import Alarm
from megatron_laser.observability.best_effort import SafeOutput
from megatron_laser.observability.quantities import format_count, format_duration
from megatron_laser.observability.rates import speed_fields
from megatron_laser.observability.readout_fields import readout_fields
from megatron_laser.observability.source_metrics import later_metrics, metrics_by_source

HISTORY = 2048  # steps that a sparkline covers
_SPARK_WIDTH = 48
_BAR_WIDTH = 40
_PHASE_STYLES = {
    "generate": "blue",
    "grade": "yellow",
    "logprob": "magenta",
    "train": "green",
    "sync": "cyan",
}
LiveMode = Literal["auto", "on", "off"]
_REFRESHES_PER_SECOND = 2.0
_SECONDS_BETWEEN_LINES = 2.0
_ETA_STEPS = 50  # recent steps whose pace the remaining time is estimated from
_EVALUATIONS = ("eval/", "test/")
_HISTORIES = ("reward_mean", "self_reward_f1")

PHASES = ("generate", "grade", "logprob", "train", "sync")

# label, metric, format; in the order in which a person looks
LINE_FIELDS = (
    ("reward", "reward_mean", ".3f"),
    ("F1", "self_reward_f1", ".3f"),
    ("AUROC", "self_reward_auroc", ".3f"),
    ("policy", "policy_loss", ".4f"),
    ("self", "self_reward_loss", ".4f"),
    ("grad", "grad_norm", ".2f"),
    ("lr", "lr", ".3g"),
    ("len", "response_length_mean", ".0f"),
)
EVALUATION_FIELDS = tuple(
    (prefix + label, f"{split}/{name}", ".3f")
    for split, prefix in (("eval", ""), ("test", "test "))
    for label, name in (
        ("accuracy", "accuracy"),
        ("F1", "self_reward_f1"),
        ("AUROC", "self_reward_auroc"),
        ("majority", "majority"),
        ("weighted", "weighted_majority"),
    )
)
# Of one source; of its evaluations there is no room for more.
_SOURCE_EVALUATIONS = (("eval", "eval/accuracy", ".3f"), ("test", "test/accuracy", ".3f"))
_MOST_SOURCES = 8  # lines of the live view
_MOST_IN_A_LINE = 4
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-:=+*#"


def number(metrics: Mapping[str, Any], name: str) -> float | None:
    """The metric as a finite float, or None where it is missing, null or NaN."""
    value = metrics.get(name)
    if value is None or isinstance(value, (str, list)) or not math.isfinite(float(value)):
        return None
    return float(value)


def format_fields(
    metrics: Mapping[str, Any], fields: Sequence[tuple[str, str, str]]
) -> list[tuple[str, str]]:
    """(label, text) of those fields that are there."""
    values = ((label, number(metrics, name), spec) for label, name, spec in fields)
    return [(label, format(value, spec)) for label, value, spec in values if value is not None]


def step_fields(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of one step's numbers; with dropped groups also the accuracy over everything that was graded.

    Responses that could not be graded are counted where there are any.
    """
    fields = format_fields(metrics, LINE_FIELDS)
    tried = number(metrics, "accuracy_tried")
    if tried is not None and number(metrics, "groups_dropped"):
        right, wrong = (number(metrics, f"groups_dropped_{name}") or 0 for name in ("right", "wrong"))
        fields.insert(
            1, ("of all tried", f"{tried:.3f} (dropped {right:.0f} all right, {wrong:.0f} all wrong)")
        )
    failed = number(metrics, "grading_failed")
    if failed:
        fields.append(("not graded", f"{failed:.0f}"))
    kinds = ("timeout", "error", "invalid")
    unmade = sum(number(metrics, f"function_failed_{kind}") or 0 for kind in kinds)
    if unmade:
        fields.append(("not made", f"{unmade:.0f}"))
    return fields


def plain_line(step: int, total_steps: int, metrics: Mapping[str, Any]) -> str:
    """One step as one line of a log."""
    width = len(str(total_steps))
    parts = [f"step {step:>{width}}/{total_steps}"]
    parts += [f"{label} {text}" for label, text in step_fields(metrics)]
    rate = number(metrics, "time/tokens_per_second")
    if rate is not None:
        parts.append(f"{format_count(rate)} tok/s")
    parts += speed_fields(metrics)
    total = number(metrics, "time/total")
    if total is not None:
        split = [f"{name} {share:.0%}" for name, share in time_shares(metrics) if share >= 0.05]
        scores = number(metrics, "rollout/score_time_fraction")
        if scores:
            split.append(f"scores {scores:.1%} of the requests' time")
        parts.append(f"{total:.2f} s" + (f" ({', '.join(split)})" if split else ""))
    read = format_fields(metrics, readout_fields(metrics))
    if read:
        parts.append("| " + " ".join(f"{label} {text}" for label, text in read))
    sources = metrics_by_source(metrics)
    if 0 < len(sources) <= _MOST_IN_A_LINE:
        rewards = ((name, number(mine, "reward_mean")) for name, mine in sources.items())
        texts = [f"{name} {reward:.3f}" for name, reward in rewards if reward is not None]
        parts += [f"| reward of {', '.join(texts)}"] if texts else []
    evaluation = format_fields(metrics, EVALUATION_FIELDS)
    if evaluation:
        parts.append("| eval " + " ".join(f"{label} {text}" for label, text in evaluation))
    return "  ".join(parts)


def time_shares(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Each phase's share of the phases' sum."""
    seconds = [(phase, number(metrics, f"time/{phase}") or 0.0) for phase in PHASES]
    total = sum(value for _, value in seconds)
    return [(phase, value / total) for phase, value in seconds] if total > 0 else []


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """At most `width` characters, each the mean of its share of `values`, from lowest to highest."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    if high - low < 1e-12:
        return blocks[0] * count
    return "".join(blocks[round((mean - low) / (high - low) * (len(blocks) - 1))] for mean in means)


@dataclass(slots=True)
class ViewState:
    """What is shown. The training thread writes it, the refresh thread reads it."""

    title: str
    total_steps: int
    step: int = 0
    eta: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    history: dict[str, deque[float]] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    alarms: Sequence[Alarm] = ()


def render(state: ViewState, console: Console) -> RenderableType:
    """Progress, numbers, time split and sparklines in one panel."""
    ascii_only = console.options.ascii_only
    body = Table.grid(padding=(0, 2))
    body.add_column(style="dim", no_wrap=True)
    body.add_column()
    for label, content in (
        ("step", _progress(state)),
        ("alarms", _alarms(state)),
        ("now", _numbers(step_fields(state.metrics))),
        ("readouts", _numbers(format_fields(state.metrics, readout_fields(state.metrics)))),
        ("eval", _numbers(format_fields(state.evaluation, EVALUATION_FIELDS))),
        ("sources", _sources(state)),
        ("time", _time_split(state.metrics, ascii_only)),
        ("reward", _spark(state, "reward_mean", "blue", ascii_only)),
        ("F1", _spark(state, "self_reward_f1", "green", ascii_only)),
    ):
        if content is not None:
            body.add_row(label, content)
    return Panel(Group(body), title=state.title, title_align="left", border_style="dim", expand=False)


def _progress(state: ViewState) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    left = "" if state.eta is None else f"eta {format_duration(state.eta)}"
    row.add_row(
        f"{state.step}/{state.total_steps}",
        ProgressBar(total=max(1, state.total_steps), completed=state.step, width=_BAR_WIDTH),
        f"{state.step / max(1, state.total_steps):.0%}",
        left,
    )
    return row


def _numbers(pairs: list[tuple[str, str]]) -> Text | None:
    if not pairs:
        return None
    text = Text()
    for label, value in pairs:
        text.append(f"{label} ", style="dim").append(f"{value}  ")
    return text


def _alarms(state: ViewState) -> Text | None:
    """Those that are on; their lines above have the rest."""
    names = ", ".join(f"{alarm.title} (step {alarm.step})" for alarm in state.alarms)
    return Text(names, style="bold red") if names else None


def _sources(state: ViewState) -> RenderableType | None:
    """A line for each source, as it was when it last had a response; cut at the window's edge."""
    shown = list(state.sources.items())[:_MOST_SOURCES]
    if not shown:
        return None
    width = max(cell_len(name) for name, _ in shown)
    lines = []
    for name, mine in shown:
        line = Text(set_cell_size(name, width) + "  ", no_wrap=True, overflow="ellipsis")
        pairs = step_fields(mine) + format_fields(mine, _SOURCE_EVALUATIONS)
        lines.append(line.append_text(_numbers(pairs) or Text("–")))
    if left := len(state.sources) - len(shown):
        lines.append(Text(f"and {left} more", style="dim"))
    return Group(*lines)


def _time_split(metrics: dict[str, Any], ascii_only: bool) -> RenderableType | None:
    total = number(metrics, "time/total")
    shares = time_shares(metrics)
    if total is None and not shares:
        return None
    text = Text()
    if total is not None:
        text.append(f"{total:.2f} s ")
    rate = number(metrics, "time/tokens_per_second")
    if rate is not None:
        text.append(f"{format_count(rate)} tok/s ", style="dim")
    for part in speed_fields(metrics):
        text.append(f"{part} ", style="dim")
    done = 0
    reached = 0.0
    for phase, share in shares:
        reached += share
        cells = round(reached * _BAR_WIDTH / 2) - done
        done += cells
        text.append((phase[0] if ascii_only else "█") * cells, style=_PHASE_STYLES[phase])
    for phase, share in shares:
        if share >= 0.05:
            text.append(f" {phase} {share:.0%}", style=_PHASE_STYLES[phase])
    return text


def _spark(state: ViewState, name: str, style: str, ascii_only: bool) -> RenderableType | None:
    values = list(state.history.get(name, ()))
    if len(values) < 2:
        return None
    text = Text(sparkline(values, _SPARK_WIDTH, ascii_only=ascii_only), style=style)
    return text.append(f"  {min(values):.2f} to {max(values):.2f}", style="dim")


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
            file=cast(TextIO, SafeOutput()), highlight=False, force_terminal=True if mode == "on" else None
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

    @property
    def is_live(self) -> bool:
        """Whether there is a view that lines go above, and no plain lines."""
        return self._live is not None and self._live.is_started

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None: it goes into a file or a pipe."""
        return self.console.width if self.console.is_terminal else None

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
        state.sources = later_metrics(state.sources, metrics_by_source(metrics))
        for name in _HISTORIES:
            value = metrics.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                state.history.setdefault(name, deque(maxlen=HISTORY)).append(float(value))
        if self._live is None:
            self._print_line(step, metrics, now)

    def show_alarms(self, alarms: Sequence[Alarm]) -> None:
        """Have these in the live view, from its next refresh on."""
        self._state.alarms = tuple(alarms)

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
