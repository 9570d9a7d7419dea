"""The table at the end: what each part did, and its measurements one a line."""

from __future__ import annotations

from typing import Any

from gpu_day_one.records import RUN

_HIDDEN = ("part", "what", "time", "rehearsal")


def render(rows: list[dict[str, Any]]) -> str:
    """Lines for people; of repeated runs the last one counts."""
    runs = {row["part"]: row for row in rows if row["what"] == RUN}
    lines = [f"{'part':18s} {'status':28s} {'seconds':>8s}"]
    for name, row in runs.items():
        rehearsal = " (rehearsal)" if row.get("rehearse") else ""
        lines.append(f"{name:18s} {row['status'] + rehearsal:28s} {row.get('seconds', '-'):>8}")
    for name in dict.fromkeys(row["part"] for row in rows):
        measured = [row for row in rows if row["part"] == name and row["what"] != RUN]
        if measured:
            lines += ["", name]
            lines += [f"  {row['what']}: {_fields(row)}" for row in measured]
        log = runs.get(name, {}).get("log")
        if log:
            lines += ["", f"{name} did not finish; the end of what it printed:"]
            lines += [f"  | {line}" for line in log.splitlines()]
    return "\n".join(lines)


def _fields(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in row.items() if key not in _HIDDEN)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
