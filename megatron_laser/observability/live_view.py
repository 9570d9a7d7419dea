"""The live view's picture, from the state of a run."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_laser.observability.live_text import (
    EVALUATION_FIELDS,
    format_count,
    format_duration,
    format_fields,
    number,
    sparkline,
    step_fields,
    time_shares,
)

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


def render(state: ViewState, console: Console) -> RenderableType:
    """Progress, numbers, time split and sparklines in one panel."""
    ascii_only = console.options.ascii_only
    body = Table.grid(padding=(0, 2))
    body.add_column(style="dim", no_wrap=True)
    body.add_column()
    for label, content in (
        ("step", _progress(state)),
        ("now", _numbers(step_fields(state.metrics))),
        ("eval", _numbers(format_fields(state.evaluation, EVALUATION_FIELDS))),
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


def _numbers(pairs: list[tuple[str, str]]) -> RenderableType | None:
    if not pairs:
        return None
    text = Text()
    for label, value in pairs:
        text.append(f"{label} ", style="dim").append(f"{value}  ")
    return text


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
