"""When each rank did what in a step, as spans in timeline.jsonl: who waited for whom."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_laser.observability.best_effort import BestEffort
from megatron_laser.observability.events import append_line, cut_lines

FILE = "timeline.jsonl"
MOST = (
    32  # spans of a phase on one rank: a phase that comes and goes more often is shown with its gaps closed
)


class Span(NamedTuple):
    """A phase of a step: seconds from the step's start on this rank, before 0 where it began in the step before."""

    phase: str
    start: float
    end: float


def joined(spans: Sequence[Span], most: int = MOST) -> list[Span]:
    """Of each phase no more than `most`: those with the smallest gaps between them become one. In order of starts."""
    found: list[Span] = []
    by_phase: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        by_phase.setdefault(span.phase, []).append(span)
    for phase, own in by_phase.items():
        gaps = sorted(
            range(1, len(own)), key=lambda place: own[place].start - own[place - 1].end, reverse=True
        )
        begins = sorted([0, *gaps[: most - 1]])
        for begin, end in zip(begins, [*begins[1:], len(own)], strict=True):
            found.append(Span(phase, own[begin].start, max(span.end for span in own[begin:end])))
    return sorted(found, key=lambda span: (span.start, span.end))


class TimelineFile:
    """Appends to `output_dir`/timeline.jsonl, on rank 0; best effort."""

    def __init__(self, folder: Path, *, last_step: int) -> None:
        """What an earlier start wrote of steps after `last_step` is cut off."""
        self._path = folder / FILE
        self._writing = BestEffort("logging.timeline_every")
        self._writing(lambda: cut_lines(self._path, last_step))

    def add(self, step: int, spans: Mapping[str, Sequence[Span]]) -> None:
        """A step's spans, by who did it: "rank N"."""
        found = [
            {"who": who, "phase": phase, "start": round(start, 4), "end": round(end, 4)}
            for who, own in spans.items()
            for phase, start, end in own
        ]
        line = json.dumps({"step": step, "spans": found}, separators=(",", ":"))
        self._writing(lambda: append_line(self._path, line))
