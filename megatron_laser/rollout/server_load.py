"""What an SGLang server says of its load, as read in SGLang 0.5.23 (`managers/load_snapshot.py`).

Its HTTP process answers `sglang_api.LOADS` from shared memory: the scheduler, which writes there when it prefills, when
it falls idle and every few decode steps, is not asked, and needs no `--enable-metrics`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """One server at one time: requests that run, requests that wait, and the share of key/value slots in use."""

    running: float
    queued: float
    kv_usage: float


IDLE = ServerLoad(0.0, 0.0, 0.0)


def parse_load(answer: Any) -> ServerLoad | None:
    """An answer of `LOADS`, over the server's data-parallel ranks; None: it says nothing of its load."""
    ranks = answer.get("loads") if isinstance(answer, dict) else None
    if not isinstance(ranks, list) or not ranks:
        return None
    columns = []
    for name in ("num_running_reqs", "num_waiting_reqs", "token_usage"):
        values = [rank.get(name) if isinstance(rank, dict) else None for rank in ranks]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            return None
        columns.append(sum(float(value) for value in values if value is not None))
    running, queued, usage = columns
    return ServerLoad(running, queued, usage / len(ranks))
