"""The report's section on settings that were changed while a run was under way, and on what it began with."""

from __future__ import annotations

from typing import Any

from megatron_laser.observability.run_record import changes_in, read_run_record
from megatron_laser.report.run_data import Run


def changed_settings(runs: list[Run]) -> list[str]:
    """Heading and Markdown, with a table for each run that has changes or is a branch; [] where none is."""
    parts = []
    for run in runs:
        record = read_run_record(run.folder)
        lines = _branch(record) + _table(record)
        if lines:
            parts += [f"**{run.label}**\n", "\n".join(lines) + "\n"]
    return ["## Changed on the way\n", *parts] if parts else []


def _branch(record: dict[str, Any]) -> list[str]:
    origin = record.get("branched_from")
    if not isinstance(origin, dict):
        return []
    return [f"A branch: it began with what `{origin.get('folder')}` was after step {origin.get('step')}.\n"]


def _table(record: dict[str, Any]) -> list[str]:
    changes = changes_in(record)
    if not changes:
        return []
    lines = ["| from step | setting | from | to | |", "| --- | --- | --- | --- | --- |"]
    for one in changes:
        before, after = (str(value).replace("|", "\\|") for value in (one.before, one.after))
        what = "what is learned" if one.kind == "learning" else "how it runs"
        lines.append(f"| {one.step} | `{one.key}` | {before} | {after} | {what} |")
    return lines
