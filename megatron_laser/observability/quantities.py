"""Seconds, counts and bytes as a person reads them in a line, and the time as files have it."""

from __future__ import annotations

import time


def utc_now() -> str:
    """ISO 8601, UTC, whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def format_duration(seconds: float) -> str:
    """42s, 3m12s, 2h05m or 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(value: float) -> str:
    """842, 12.3k, 4.56M."""
    if abs(value) < 1e3:
        return f"{value:.0f}"
    return f"{value / 1e3:.1f}k" if abs(value) < 1e6 else f"{value / 1e6:.2f}M"


def format_size(size: float) -> str:
    """842 B, 12.3 KiB, 4.5 MiB, 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
