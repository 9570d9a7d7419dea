"""Runs as `megatron-laser status` shows them: one in some lines, several as a table. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_laser.observability.quantities import format_duration
from megatron_laser.run.observed import SILENT, Observed

_LABEL = 12
_LATE = 90.0  # seconds without a sign of life of a run that goes on
_FORMS = {"lr": ".3g", "length": ".0f", "grad norm": ".2f", "policy loss": ".4f", "self-reward loss": ".4f"}
COLUMNS = ("run", "state", "step", "left", "accuracy", "AUROC", "checkpoint", "alarms", "phase")


def one_run(run: Observed) -> list[str]:
    """A line for each thing that somebody asks."""
    told = [("run", f"{run.name}, in {run.folder}"), ("state", _state(run))]
    if run.goes_on and run.phase:
        since = "" if run.phase_seconds is None else f", for {format_duration(run.phase_seconds)}"
        told.append(("phase", f"{run.phase}{since}"))
    told.append(("step", _step(run)))
    if run.metrics:
        told.append(("numbers", ", ".join(_number(label, value) for label, value in run.metrics.items())))
    if run.evaluation:
        told.append(("evaluation", run.evaluation))
    told.append(("checkpoint", _checkpoint(run)))
    told += [("alarm", text) for text in run.alarms] or [("alarm", "none is on")]
    if run.servers or run.lost_servers:
        told.append(("servers", _servers(run)))
    for place, event in enumerate(run.events):
        text = f"{event.get('time', '')} step {event.get('step', '?')} {event.get('kind', '')}: {event.get('text', '')}"
        told.append(("events" if place == 0 else "", f"{text:.160}"))
    told.append(("look", _look(run)))
    if run.command and not run.goes_on and run.state != "finished":
        told.append(("continue", run.command))
    return [f"{label:<{_LABEL}}{text}" for label, text in told]


def table(runs: Sequence[Observed]) -> list[str]:
    """A row for each run, with the columns' names above."""
    rows = [COLUMNS, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _row(run: Observed) -> tuple[str, ...]:
    accuracy, auroc = (run.metrics.get(name) for name in ("accuracy", "AUROC"))
    return (
        run.folder,
        run.state,
        f"{run.step}/{run.steps or '?'}",
        "-" if run.seconds_left is None else format_duration(run.seconds_left),
        "-" if accuracy is None else f"{accuracy:.3f}",
        "-" if auroc is None else f"{auroc:.3f}",
        "-" if run.checkpoint is None else str(run.checkpoint),
        str(len(run.alarms)),
        run.phase if run.goes_on else run.reason[:60] or "-",
    )


def _state(run: Observed) -> str:
    ranks = f"{run.world_size} rank{'' if run.world_size == 1 else 's'}"
    where = f"process {run.pid} on {run.host}, {ranks}" if run.pid else ""
    parts = [run.state + (f": {run.reason}" if run.reason else "")]
    if run.goes_on:
        parts += [where, f"started {run.started}"]
        if run.heard_seconds is not None and run.heard_seconds > _LATE:
            parts.append(f"last heard of {format_duration(run.heard_seconds)} ago")
    elif run.state == SILENT:
        parts += [f"it was killed, or its machine went down ({where})" if where else "it was killed"]
        if run.heard_seconds is not None:
            parts.append(
                f"last heard of {format_duration(run.heard_seconds)} ago, in: {run.phase or 'its start'}"
            )
    else:
        if run.heard_seconds is not None:
            parts.append(f"{format_duration(run.heard_seconds)} ago")
        parts.append(f"exit status {run.exit_status}")
    return ", ".join(filter(None, parts))


def _step(run: Observed) -> str:
    parts = [f"{run.step} of {run.steps or 'an unknown number of'}"]
    if run.step_seconds is not None:
        parts.append(f"{run.step_seconds:.3g} s a step (mean of the last ones)")
    if run.seconds_left is not None:
        parts.append(f"{format_duration(run.seconds_left)} left, evaluations and saves not counted")
    return ", ".join(parts)


def _number(label: str, value: float) -> str:
    return f"{label} {value:{_FORMS.get(label, '.3f')}}"


def _checkpoint(run: Observed) -> str:
    if run.checkpoint is None:
        newest = "none yet"
    else:
        behind = run.step - run.checkpoint
        newest = f"newest of step {run.checkpoint}" + (
            f", {behind} step{'' if behind == 1 else 's'} behind" if behind > 0 else ""
        )
    if "step" not in run.best:
        return newest
    by = f" ({run.best['metric']} {run.best.get('value')})" if "metric" in run.best else ""
    return f"{newest}; best of step {run.best['step']}{by}"


def _servers(run: Observed) -> str:
    parts = []
    if "servers_healthy" in run.servers:
        parts.append(f"{run.servers['servers_healthy']:g} take requests")
    if run.servers.get("server_deaths"):
        parts.append(f"{run.servers['server_deaths']:g} died in the last step")
    if run.lost_servers:
        parts.append(f"lost: {', '.join(run.lost_servers)}")
    return "; ".join(parts)


def _look(run: Observed) -> str:
    folder = run.folder
    if run.goes_on:
        return f"megatron-laser view {folder}; if it hangs: megatron-laser stacks {folder}"
    return f"megatron-laser report {folder}, megatron-laser view {folder}"
