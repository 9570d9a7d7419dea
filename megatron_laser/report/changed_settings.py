"""The report's section on settings that were changed while a run was under way, and on what it began with."""

from __future__ import annotations

import json
from typing import Any

from megatron_laser.report.run_data import Run

_RECORD = "run.json"


def changed_settings(runs: list[Run]) -> list[str]:
    """Heading and Markdown, with a table for each run that has changes or is a branch; [] where none is."""
    parts = []
    for run in runs:
        record = _record(run)
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
    changes = [one for one in record.get("changes") or () if isinstance(one, dict)]
    if not changes:
        return []
    lines = ["| from step | setting | from | to | |", "| --- | --- | --- | --- | --- |"]
    for one in sorted(changes, key=lambda change: int(change.get("step", 0))):
        before, after = (str(one.get(key)).replace("|", "\\|") for key in ("from", "to"))
        what = "what is learned" if one.get("kind") == "learning" else "how it runs"
        lines.append(f"| {one.get('step')} | `{one.get('key')}` | {before} | {after} | {what} |")
    return lines


def _record(run: Run) -> dict[str, Any]:
    try:
        record = json.loads((run.folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
