"""What happened in a run besides learning, by metrics.jsonl and events.jsonl: for the report and the last lines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_laser.config.schema.alarms import AlarmSettings
from megatron_laser.files import last_lines
from megatron_laser.observability.alarms import Alarm, alarms_of
from megatron_laser.observability.events import FILE
from megatron_laser.rewards.grade import FAILED_OUTCOMES, NOT_ONE_GRADED

_READ = 1 << 26  # bytes of events.jsonl: half a million events
_MOST = 5  # of each kind are told in full
_FAILED = "function_failed_"
# How the events of checkpoints begin where all is well; `trainer.checkpoint.manager` and `run.export` write them.
_SAVES = ("saved ", "saving ", "deleted ", "exported ")
_NOT_JUDGED = "does not count for what is the best"  # `evaluation.keeping` says it
_NOT_SAVED = "the checkpoint was not saved"
NOTHING = (
    "no update was skipped, every response was graded, no alarm was raised, nothing fell back to another way, no save "
    "failed and no server was lost."
)


@dataclass(frozen=True)
class Told:
    """An event: the step, and what it said."""

    step: int
    text: str


@dataclass(frozen=True)
class Happened:
    """Of a whole run, all its starts together.

    Attributes:
        steps: the last one of metrics.jsonl.
        skipped: step -> updates that were skipped because something was not finite. reasons: in words, from the events.
        responses: that were handed to the graders. not_graded: outcome -> how many of them.
        evaluated_not_graded: the same of evaluations on the validation split, where it counts as wrong.
        not_made: kind of failure -> samples that `rollout.function` did not make.
        lost, back: servers that were lost (or started again), and that came back.
        saves: that were published. failed_saves: why others were not.
        nothing_graded: stops because not one response of a step, which has no line of metrics, could be graded.
        not_judged: evaluations without the metric that `checkpoint.best` or `run.early_stop` names.
        starts: how often it was started. killed: how many of these ended without a word.
    """

    steps: int
    skipped: dict[int, int]
    reasons: list[Told]
    responses: int
    not_graded: dict[str, int]
    not_made: dict[str, int]
    alarms: list[Alarm]
    fallbacks: list[Told]
    lost: list[Told]
    back: int
    saves: list[Told]
    failed_saves: list[Told]
    warnings: list[Told]
    starts: int
    killed: int
    evaluations_left_out: list[Told] = field(default_factory=list)
    nothing_graded: list[Told] = field(default_factory=list)
    not_judged: list[Told] = field(default_factory=list)
    evaluated_not_graded: dict[str, int] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """What went wrong, a sentence each, the worst first; [] where nothing did."""
        return [
            *self._skipped_words(),
            *self._grading_words(),
            *(_alarm_words(alarm) for alarm in self.alarms),
            *_each("a save failed", self.failed_saves),
            *self._server_words(),
            *_each("fallback", self.fallbacks),
            *_each("an evaluation", self.evaluations_left_out),
            *self._judging_words(),
            *_each("warning", self.warnings),
            *self._start_words(),
        ]

    def _skipped_words(self) -> list[str]:
        if not self.skipped:
            return []
        reason = f"; the last one: {self.reasons[-1].text}" if self.reasons else ""
        return [
            f"{_many(sum(self.skipped.values()), 'update')} skipped because loss or gradient norm was not finite, in "
            f"{_steps(self.skipped)}: the batches are in bad_steps/{reason}"
        ]

    def _grading_words(self) -> list[str]:
        told = _each("a start ended", self.nothing_graded)
        if count := sum(self.not_graded.values()):
            kinds = ", ".join(f"{outcome} {number:,}" for outcome, number in self.not_graded.items())
            of = f" of {self.responses:,}" if self.responses > count else ""
            told.append(f"{_many(count, 'response', of)} not graded and left out: {kinds}")
        if count := sum(self.evaluated_not_graded.values()):
            kinds = ", ".join(
                f"{outcome} {number:,}" for outcome, number in self.evaluated_not_graded.items()
            )
            told.append(f"in evaluations {_many(count, 'response')} not graded and counted as wrong: {kinds}")
        if count := sum(self.not_made.values()):
            kinds = ", ".join(f"{kind} {number:,}" for kind, number in self.not_made.items())
            told.append(f"{_many(count, 'sample')} not made by rollout.function and left out: {kinds}")
        return told

    def _judging_words(self) -> list[str]:
        if not self.not_judged:
            return []
        count, last = len(self.not_judged), self.not_judged[-1]
        return [
            f"{_many(count, 'evaluation')} not compared with the best; the last: step {last.step}: {last.text}"
        ]

    def _server_words(self) -> list[str]:
        if not self.lost:
            return []
        count = len(self.lost)
        head = f"servers were lost {count} time{'' if count == 1 else 's'} and came back {self.back}"
        return [f"{head}; the last: step {self.lost[-1].step}: {self.lost[-1].text}"]

    def _start_words(self) -> list[str]:
        if not self.killed:
            return []
        return [
            f"{self.killed} of {self.starts} starts ended without saying so: killed, or its machine went down"
        ]


def what_happened(
    rows: Sequence[Mapping[str, Any]], events: Iterable[Mapping[str, Any]], settings: AlarmSettings
) -> Happened:
    """Sum up a run.

    Args:
        rows: of metrics.jsonl in order of steps. events: of events.jsonl, in their order.
        settings: of its alarms.
    """
    trained = [row for row in rows if row["step"] >= 1]
    kinds: dict[str, list[Told]] = {}
    lives: list[Mapping[str, Any]] = []
    for event in events:
        kind, text = str(event.get("kind", "")), str(event.get("text", ""))
        step = event.get("step")
        kinds.setdefault(kind, []).append(Told(step if isinstance(step, int) else 0, text))
        if kind in ("start", "stop", "end"):
            lives.append(event)
    servers, checkpoints = kinds.get("server", []), kinds.get("checkpoint", [])
    killed = sum(one["kind"] == "start" and _after_silence(other) for one, other in pairwise(lives))
    skipped = {int(row["step"]): int(count) for row in trained if (count := _number(row, "bad_steps"))}
    for one in kinds.get("skipped", []):  # the one that ends a run has no line of metrics
        skipped.setdefault(one.step, 1)
    outcomes = _sums(trained, "outcome/")
    failed = {outcome: count for outcome, count in outcomes.items() if outcome in FAILED_OUTCOMES}
    unexplained = int(sum(_number(row, "grading_failed") for row in trained)) - sum(failed.values())
    if unexplained > 0:
        failed["other"] = unexplained
    return Happened(
        steps=max((int(row["step"]) for row in trained), default=0),
        skipped=skipped,
        reasons=kinds.get("skipped", []),
        responses=sum(outcomes.values()) + max(0, unexplained),
        not_graded=failed,
        not_made=_sums(trained, _FAILED),
        alarms=alarms_of(rows, settings),
        fallbacks=kinds.get("fallback", []),
        lost=[one for one in servers if "is lost" in one.text or "was started again" in one.text],
        back=sum(one.text.endswith("is back") for one in servers),
        saves=[one for one in checkpoints if one.text.startswith("saved ")],
        failed_saves=[one for one in checkpoints if one.text.startswith(_NOT_SAVED)],
        warnings=[
            *kinds.get("warning", []),
            *(one for one in checkpoints if not one.text.startswith((*_SAVES, _NOT_SAVED))),
        ],
        starts=len(kinds.get("start", [])),
        killed=killed,
        evaluated_not_graded={
            outcome: count
            for outcome, count in _sums(rows, "eval/outcome/").items()
            if outcome in FAILED_OUTCOMES
        },
        not_judged=[one for one in kinds.get("evaluation", []) if _NOT_JUDGED in one.text],
        nothing_graded=[one for one in kinds.get("stop", []) if NOT_ONE_GRADED in one.text],
        evaluations_left_out=[one for one in kinds.get("evaluation", []) if "is left out" in one.text],
    )


def _after_silence(event: Mapping[str, Any]) -> bool:
    """Whether it is a start, and the one before ended without a word.

    What that one said last may be gone: a run that goes on from an earlier step, and a branch, leave out the events of
    later ones. Each start has noted it in its facts; those of an earlier version have none.
    """
    if event.get("kind") != "start":
        return False
    facts = event.get("facts")
    if not isinstance(facts, Mapping) or "earlier" not in facts:
        return True
    return "without saying so" in str((facts["earlier"] or {}).get("ended", ""))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of the run in `folder`, the newest half a million of them; none of a run that has not written any."""
    return last_lines(folder / FILE, most=0, at_least=_READ)


def _alarm_words(alarm: Alarm) -> str:
    steps = (
        f"from step {alarm.step} on"
        if alarm.last_step is None
        else f"steps {alarm.step} to {alarm.last_step}"
    )
    return f"alarm {alarm.name}, {steps}: {alarm.title}; look at {alarm.place}"


def _each(what: str, told: Sequence[Told]) -> list[str]:
    """The first ones with their steps, equal ones together, and how many there are besides."""
    texts: dict[str, list[int]] = {}
    for one in told:
        texts.setdefault(one.text, []).append(one.step)
    words = [
        f"{what} at step {steps[0]}{f' (and {len(steps) - 1} more)' if len(steps) > 1 else ''}: {text}"
        for text, steps in list(texts.items())[:_MOST]
    ]
    left = len(texts) - _MOST
    return words + ([f"{what}: {left} more, see {FILE}"] if left > 0 else [])


def _steps(steps: Iterable[int]) -> str:
    listed = list(steps)
    shown = ", ".join(map(str, listed[:_MOST]))
    more = f" and {len(listed) - _MOST} more" if len(listed) > _MOST else ""
    return f"step{'' if len(listed) == 1 else 's'} {shown}{more}"


def _many(number: int, what: str, of: str = "") -> str:
    return f"{number:,}{of} {what}{' was' if number == 1 and not of else 's were'}"


def _sums(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, int]:
    """Name behind the prefix -> sum over the rows, where it is above 0; the largest first."""
    sums: Counter[str] = Counter()
    for row in rows:
        for name in row:
            if name.startswith(prefix):
                sums[name.removeprefix(prefix)] += int(_number(row, name))
    return {name: count for name, count in sums.most_common() if count > 0}


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
