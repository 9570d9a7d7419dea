"""One run's folder, read while it grows: metrics, settings, timeline, events, checkpoints, and whether it goes on."""

from __future__ import annotations

import math
import os
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_laser.config import ConfigError
from megatron_laser.config.yaml_source import read_yaml
from megatron_laser.files import LOCK
from megatron_laser.viewer.growing_file import GrowingFile, read_line

_CHECKPOINT = re.compile(r"step_(\d{8})")
_OWNER = re.compile(r"process (\d+) on (\S+)")
_QUIET = 600.0  # seconds without a line of metrics after which a run on another machine no longer counts as going on
_SETTINGS_SHOWN = 400  # characters of one setting


class RunFolder:
    """What is in it; `refresh` reads what is new. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = 0
        self._lock = threading.RLock()
        self._metrics = GrowingFile(folder / "metrics.jsonl")
        self._timeline = GrowingFile(folder / "timeline.jsonl")
        self._events = GrowingFile(folder / "events.jsonl")
        self._rows: dict[int, dict[str, Any]] = {}
        self._names: dict[str, None] = {}  # of metrics that are numbers, in the order in which they came
        self._spans: dict[int, tuple[int, int]] = {}  # step -> offset and length of its line
        self.events: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self._config_seen: tuple[int, int] | None = None
        self._seen: tuple[Any, ...] = ()
        self.state = "unknown"
        self.checkpoints: list[int] = []
        self.refresh()

    def refresh(self) -> None:
        """Read what was written since the last call; `version` goes up when something was."""
        with self._lock:
            changed = self._refresh_metrics() | self._refresh_timeline() | self._refresh_events()
            changed |= self._refresh_config()
            self.state, self.checkpoints = self._state_now(), self._checkpoints_now()
            seen = (self.state, tuple(self.checkpoints))
            if changed or seen != self._seen:
                self._seen = seen
                self.version += 1

    @property
    def name(self) -> str:
        """`run.name`, or the folder's."""
        return str((self.config.get("run") or {}).get("name") or self.folder.resolve().name)

    @property
    def total_steps(self) -> int | None:
        """`run.steps`."""
        steps = (self.config.get("run") or {}).get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def last_step(self) -> int | None:
        """The newest step of metrics.jsonl; None: it has none."""
        return max(self._rows, default=None)

    @property
    def metric_names(self) -> list[str]:
        """Of all metrics that were a number in some step."""
        return list(self._names)

    def rows(self) -> list[dict[str, Any]]:
        """Lines of metrics in order of steps, those of one step merged, null as NaN as `read_metrics` has it."""
        with self._lock:
            return [
                {name: math.nan if value is None else value for name, value in self._rows[step].items()}
                for step in sorted(self._rows)
            ]

    def curves(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """{"steps", "values"} as the page reads them; None: all metrics. A name that is unknown is left out."""
        with self._lock:
            steps = sorted(self._rows)
            rows = [self._rows[step] for step in steps]
            wanted = self.metric_names if names is None else [name for name in names if name in self._names]
            return {
                "steps": steps,
                "values": {name: [_number(row.get(name)) for row in rows] for name in wanted},
            }

    def metrics_of(self, step: int) -> dict[str, Any]:
        """All of one step; {}: it is not there."""
        with self._lock:
            return {name: value for name, value in self._rows.get(step, {}).items() if name != "step"}

    @property
    def timeline_steps(self) -> list[int]:
        """Steps that have spans."""
        return sorted(self._spans)

    def spans_of(self, step: int) -> list[dict[str, Any]]:
        """The spans of a step's phases; []: they were not written."""
        place = self._spans.get(step)
        record = None if place is None else read_line(self._timeline.path, *place)
        spans = (record or {}).get("spans")
        return spans if isinstance(spans, list) else []

    def settings(self) -> dict[str, Any]:
        """config.yaml with dotted names."""
        return dict(_flat(self.config))

    def _refresh_metrics(self) -> bool:
        anew, lines = self._metrics.new_lines()
        if anew:
            self._rows, self._names = {}, {}
        for line in lines:
            step = line.record.get("step")
            if not isinstance(step, int):
                continue
            self._rows.setdefault(step, {}).update(line.record)
            for name, value in line.record.items():
                if name != "step" and _number(value) is not None:
                    self._names.setdefault(name)
        return anew or bool(lines)

    def _refresh_timeline(self) -> bool:
        anew, lines = self._timeline.new_lines()
        if anew:
            self._spans = {}
        for line in lines:
            if isinstance(step := line.record.get("step"), int):
                self._spans[step] = (line.offset, line.length)
        return anew or bool(lines)

    def _refresh_events(self) -> bool:
        anew, lines = self._events.new_lines()
        if anew:
            self.events = []
        self.events += [line.record for line in lines]
        return anew or bool(lines)

    def _refresh_config(self) -> bool:
        path = self.folder / "config.yaml"
        try:
            status = path.stat()
            seen = (status.st_mtime_ns, status.st_size)
        except OSError:
            return False
        if seen == self._config_seen:
            return False
        self._config_seen = seen
        with suppress(ConfigError):  # being replaced, or broken: the run's other files can be read without it
            self.config = {str(key): value for key, value in read_yaml(path).data.items()}
        return True

    def _state_now(self) -> str:
        if (self.folder / "FINISHED").exists():
            return "finished"
        process = host = ""
        with suppress(OSError):
            if match := _OWNER.match((self.folder / LOCK).read_text(encoding="utf-8", errors="replace")):
                process, host = match[1], match[2]
        if host == socket.gethostname() and _alive(int(process)):
            return "running"
        if (self.folder / "STOPPED").exists():
            return "stopped"
        with suppress(OSError):
            age = time.time() - self._metrics.path.stat().st_mtime
            if host and host != socket.gethostname() and age < _QUIET:
                return "running"
        return "unknown"

    def _checkpoints_now(self) -> list[int]:
        own = (self.config.get("checkpoint") or {}).get("folder")
        root = Path(own) if own else self.folder / "checkpoints"
        try:
            found = [
                (int(match[1]), path)
                for path in root.iterdir()
                if (match := _CHECKPOINT.fullmatch(path.name))
            ]
        except OSError:
            return []
        return sorted(step for step, path in found if (path / "state.json").is_file())


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _number(value: Any) -> float | int | None:
    """What a curve shows of a metric: lists, text and what is not finite are no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            entries += _flat(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, (bool, int, float)):
            entries.append((f"{prefix}{key}", value))
        else:
            text = value if isinstance(value, str) else str(value)
            entries.append((f"{prefix}{key}", text[:_SETTINGS_SHOWN]))
    return entries
