"""What can be seen of a run from outside, by its files alone: whether it lives, what it does, and how it goes.

Reads the ends of files, so that it takes no longer for a long run. No torch. A file that is missing, or is being
written, leaves out what it would have said.
"""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_laser.config.yaml_source import read_yaml
from megatron_laser.errors import ConfigError, UserError
from megatron_laser.files import is_locked, last_lines
from megatron_laser.observability.events import FILE as EVENTS
from megatron_laser.run.status import Status, read_status

SILENT = "ended without saying so"
"""The state of a run whose last words were that it goes on, and that does not."""
GOES_ON = ("starting", "running", "stopping")
_EXIT = {"finished": 0, "failed": 1, "stopped": 3, SILENT: 5} | dict.fromkeys(GOES_ON, 4)
_FILES = ("status.json", "run.json", "metrics.jsonl")  # of which a run has one
_ROWS = 20  # whose seconds the pace is of
_EVENTS_SHOWN = 5
_EVENT_BYTES = 1 << 22
_HEARD = 120.0  # seconds: four signs of life
_CHECKPOINT = re.compile(r"step_(\d{8})")
_NUMBERS = (
    ("accuracy", ("accuracy_tried", "reward_mean")),
    ("reward", ("reward_mean",)),
    ("F1", ("self_reward_f1",)),
    ("AUROC", ("self_reward_auroc",)),
    ("entropy", ("entropy",)),
    ("policy loss", ("policy_loss",)),
    ("self-reward loss", ("self_reward_loss",)),
    ("grad norm", ("grad_norm",)),
    ("length", ("response_length_mean",)),
    ("lr", ("lr",)),
)
_SERVERS = ("rollout/servers_healthy", "rollout/server_deaths")


class NoRun(UserError, LookupError):
    """A folder that holds no run."""


@dataclass(frozen=True)
class Observed:
    """A run as it is now.

    Attributes:
        state: of status.json, or `SILENT`. reason: why it stops, has stopped or failed.
        step: the last complete one. steps: `run.steps`, 0 where that is not known.
        phase: what is being done, phase_seconds: since so long. heard_seconds: since it wrote its status.
        step_seconds: of a step, the mean of the last 20. seconds_left: at that pace, evaluations and saves left out.
        metrics: of the newest step that has each, by the names that people use. evaluation: the newest, in words.
        checkpoint: step of the newest published one. best: what best.json says.
        alarms: those that are on, in words, without what they mean.
        servers: how many take requests, and how many have died in the newest step; {} without servers.
        events: the last ones, as in events.jsonl, without the facts of starts.
        command: the shell command that continues it. exit_status: what `--exit-status` exits with.
    """

    folder: str
    name: str
    state: str
    reason: str
    step: int
    steps: int
    phase: str
    phase_seconds: float | None
    heard_seconds: float | None
    started: str
    host: str
    pid: int
    world_size: int
    step_seconds: float | None
    seconds_left: float | None
    checkpoint: int | None
    command: str
    exit_status: int
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: str = ""
    best: dict[str, Any] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    servers: dict[str, float] = field(default_factory=dict)
    lost_servers: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def goes_on(self) -> bool:
        """Whether it is alive."""
        return self.state in GOES_ON

    def as_json(self) -> dict[str, Any]:
        """Its fields by their names."""
        return asdict(self)


def observe(folder: Path) -> Observed:
    """Look at a run once.

    Raises NoRun: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise NoRun(f"{folder} is no folder: expected the run.output_dir of a run")
    if not any((folder / name).is_file() for name in _FILES):
        raise NoRun(
            f"{folder} holds no run (none of {', '.join(_FILES)}): expected the run.output_dir of a run"
        )
    now = datetime.now(UTC)
    said = read_status(folder)
    status = said or Status()
    rows = last_lines(folder / "metrics.jsonl", most=_ROWS)
    events = last_lines(folder / EVENTS, most=0, at_least=_EVENT_BYTES)
    record = _json(folder / "run.json")
    starts = [event for event in events if event.get("kind") == "start"]
    last_start = starts[-1] if starts else {}
    facts = last_start.get("facts") or {}
    state, reason = _state(folder, said, now)
    step = max([status.step, *(row["step"] for row in rows if isinstance(row.get("step"), int))])
    steps = status.steps or int(facts.get("steps") or 0) or _configured_steps(folder)
    seconds = [found for row in rows if (found := _number(row.get("time/total"))) is not None]
    pace = statistics.fmean(seconds) if seconds else None
    going = state in GOES_ON
    return Observed(
        folder=str(folder),
        name=str(facts.get("run") or record.get("name") or folder.resolve().name),
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        phase=status.phase,
        phase_seconds=_since(status.phase_since, now) if going else None,
        heard_seconds=_since(status.time, now),
        started=status.started or str(last_start.get("time") or record.get("started") or ""),
        host=status.host,
        pid=status.pid,
        world_size=int(facts.get("ranks") or status.world_size),
        step_seconds=pace,
        seconds_left=pace * max(0, steps - step) if pace is not None and steps and going else None,
        checkpoint=_newest_checkpoint(Path(facts.get("checkpoints") or folder / "checkpoints"), status),
        command=status.command,
        exit_status=_exit_status(state, status),
        metrics=_metrics(rows),
        evaluation=next((str(e.get("text", "")) for e in reversed(events) if _is_evaluation(e)), ""),
        best=_json(folder / "best.json"),
        alarms=_alarms(events),
        servers={
            name.removeprefix("rollout/"): v for name in _SERVERS if (v := _newest(rows, name)) is not None
        },
        lost_servers=_lost(events),
        events=[
            {key: value for key, value in one.items() if key != "facts"} for one in events[-_EVENTS_SHOWN:]
        ],
    )


def _state(folder: Path, status: Status | None, now: datetime) -> tuple[str, str]:
    """State and reason. The lock says whether a run lives, as far as locks reach; else process or last sign of life."""
    locked = is_locked(folder)
    if status is None:  # of an earlier version, or started a moment ago
        if (folder / "FINISHED").is_file():
            return "finished", ""
        if locked:
            return "running", ""
        if (folder / "STOPPED").is_file():
            return "stopped", str(_json(folder / "STOPPED").get("reason", ""))
        return SILENT, ""
    here = status.host == socket.gethostname()
    if status.ended:
        # Its own process may still hold the lock for a moment; another one has begun anew, and says so soon.
        if locked and not (here and _lives(status.pid)):
            return "starting", ""
        return status.state, status.reason
    heard = _since(status.time, now)
    recently = heard is not None and heard < _HEARD
    if locked or (not here and recently) or (locked is None and (_lives(status.pid) if here else recently)):
        return status.state, status.reason
    return SILENT, status.reason


def _exit_status(state: str, status: Status) -> int:
    known = _EXIT[state]
    if state in GOES_ON or state == SILENT or status.exit_status is None:
        return known
    # A worker under a launcher that takes anything else for a failure exits with 0 where it has stopped.
    return known if state == "stopped" else status.exit_status


def _lives(pid: int) -> bool:
    if pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _since(time: str, now: datetime) -> float | None:
    """Seconds since an ISO 8601 time; never below 0: clocks differ."""
    try:
        then = datetime.fromisoformat(time)
    except ValueError:
        return None
    return max(0.0, (now - then).total_seconds()) if then.tzinfo else None


def _newest_checkpoint(root: Path, status: Status) -> int | None:
    """By what lies in the folder of checkpoints; by status.json where that cannot be read from here."""
    try:
        names = os.listdir(root)
    except OSError:
        return status.checkpoint
    found = [(int(match[1]), name) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return next(
        (step for step, name in sorted(found, reverse=True) if (root / name / "state.json").is_file()), None
    )


def _configured_steps(folder: Path) -> int:
    """By config.yaml, for a run of an earlier version; 0: not known."""
    try:
        steps = (read_yaml(folder / "config.yaml").data.get("run") or {}).get("steps")
    except (ConfigError, OSError, AttributeError):
        return 0
    return steps if isinstance(steps, int) else 0


def _metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    found = {}
    for label, names in _NUMBERS:
        value = next((value for name in names if (value := _newest(rows, name)) is not None), None)
        if value is not None:
            found[label] = value
    return found


def _newest(rows: list[dict[str, Any]], name: str) -> float | None:
    return next((value for row in reversed(rows) if (value := _number(row.get(name))) is not None), None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _is_evaluation(event: dict[str, Any]) -> bool:
    return event.get("kind") == "evaluation" and "accuracy" in str(event.get("text"))


def _alarms(events: list[dict[str, Any]]) -> list[str]:
    """Those that were raised and are not over, each up to what it means."""
    on: dict[str, str] = {}
    for event in events:
        if event.get("kind") != "alarm" or "alarm" not in event:
            continue
        name = str(event["alarm"])
        on.pop(name, None)
        if event.get("on"):
            on[name] = f"{name}: {str(event.get('text', '')).partition('. ')[0]}"
    return list(on.values())


def _lost(events: list[dict[str, Any]]) -> list[str]:
    """Servers that were lost since the last start and are not back."""
    lost: dict[str, None] = {}
    for event in events:
        text = str(event.get("text", ""))
        url = text.partition(" ")[0]
        if event.get("kind") == "start":
            lost.clear()
        elif event.get("kind") == "server" and url.startswith("http"):
            if "is lost" in text or "was started again" in text:
                lost[url] = None
            elif text.endswith("is back"):
                lost.pop(url, None)
    return list(lost)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
