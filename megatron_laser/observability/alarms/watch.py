"""Alarms of a run, step by step or afterwards: raised once when many rows are beyond the limit, over when few are.

Both ways are the same code: `alarms_of` shows a watch all rows. A row counts where it says something, so evaluations,
missing metrics and NaN neither raise nor end an alarm.
"""

from __future__ import annotations

import statistics
from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from megatron_laser.config.schema.alarms import AlarmSettings
from megatron_laser.observability.alarms.judges import Judged, Row
from megatron_laser.observability.alarms.policy_rules import POLICY_RULES
from megatron_laser.observability.alarms.rule import Rule
from megatron_laser.observability.alarms.system_rules import SYSTEM_RULES

RULES: tuple[Rule, ...] = POLICY_RULES + SYSTEM_RULES
_PLACES = {rule.name: place for place, rule in enumerate(RULES)}


@dataclass(frozen=True)
class Alarm:
    """Something that is wrong with a run.

    Attributes:
        name: as in the section `alarms`.
        step: at which it was raised; the message says since when it is so.
        last_step: the last one that was still beyond the limit; None while the alarm is on.
        title: in a few words.
        message: in words, with the numbers now and before.
        place: where to look: metrics, page, command.
        value: median of the rows that were beyond the limit when it was raised.
        threshold: what they were compared with: the limit, or the early level times or plus it.
    """

    name: str
    step: int
    last_step: int | None
    title: str
    message: str
    place: str
    value: float
    threshold: float

    @property
    def line(self) -> str:
        """For a log, when it is raised."""
        return f"alarm at step {self.step}: {self.message} Look at: {self.place}"

    @property
    def end_line(self) -> str:
        """For a log, when it is over."""
        return f"alarm over: {self.title} ({self.name}), raised at step {self.step}, last seen at step {self.last_step}"


class AlarmWatch:
    """Follows a run. It is shown each row once, in order of steps; a resumed run shows it the earlier ones first.

    Attributes:
        alarms: all so far, by step; those of one step in the order of `RULES`, whichever of its rows raised them.
        ended: those that were over at the last row.
    """

    def __init__(self, settings: AlarmSettings) -> None:
        rules = RULES if settings.enabled else ()
        self._states = [_State(rule, settings) for rule in rules if rule.limit(settings) > 0.0]
        self.alarms: list[Alarm] = []
        self.ended: list[Alarm] = []

    @property
    def active(self) -> list[Alarm]:
        """Those that are on."""
        return [alarm for alarm in self.alarms if alarm.last_step is None]

    def add(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Take a row: numbers, numpy's and torch's too. Returns the alarms that it raises."""
        raised: list[Alarm] = []
        self.ended = []
        for state in self._states:
            change = state.add(step, metrics)
            if change is None:
                continue
            if change.last_step is None:
                raised.append(change)
                insort(self.alarms, change, key=lambda alarm: (alarm.step, _PLACES[alarm.name]))
            else:
                place = next(
                    index
                    for index, alarm in enumerate(self.alarms)
                    if alarm.name == change.name and alarm.last_step is None
                )
                self.alarms[place] = change
                self.ended.append(change)
        return raised


class _State:
    """One alarm: its last rows, and whether it is on."""

    def __init__(self, rule: Rule, settings: AlarmSettings) -> None:
        self._rule = rule
        self._judge = rule.judge(rule.limit(settings), settings)
        self._needed, self._of = rule.needed_of(settings)
        self._rows: deque[tuple[int, Judged]] = deque(maxlen=self._of)
        self._bad = 0
        self._last_bad = 0
        self._on: Alarm | None = None

    def add(self, step: int, row: Row) -> Alarm | None:
        """The alarm that the row raises or ends, None where it changes nothing."""
        judged = self._judge(row)
        if judged is None:
            return None
        if len(self._rows) == self._of:
            self._bad -= self._rows[0][1].bad
        self._rows.append((step, judged))
        self._bad += judged.bad
        if judged.bad:
            self._last_bad = step
        if self._on is None and self._bad >= self._needed:
            self._on = self._raise(step)
            return self._on
        # Half as many end it, so that an alarm at its limit does not come and go.
        if self._on is not None and self._bad <= self._needed // 2:
            over, self._on = replace(self._on, last_step=self._last_bad), None
            return over
        return None

    def _raise(self, step: int) -> Alarm:
        rule = self._rule
        bad = [(at, judged) for at, judged in self._rows if judged.bad]
        since, last = bad[0][0], bad[-1][1]
        value = statistics.median(judged.value for _, judged in bad)
        form = rule.form
        numbers = [f"limit {last.limit:{form}}"]
        if last.before is not None:
            numbers.insert(0, f"before {last.before:{form}}")
        if last.what:
            numbers.append(last.what)
        seen = f"{len(bad)} of the last {len(self._rows)} {rule.rows}" if self._of > 1 else "now"
        message = (
            f"{rule.title}: {rule.subject} {value:{form}} ({', '.join(numbers)}), {seen}, "
            f"since step {since}. {rule.means}"
        )
        return Alarm(rule.name, step, None, rule.title, message, rule.place, value, last.limit)


def alarms_of(rows: Sequence[Mapping[str, Any]], settings: AlarmSettings) -> list[Alarm]:
    """The alarms of a run from all its rows, in the order of `AlarmWatch.alarms`.

    Args:
        rows: of metrics.jsonl in order of steps, as `read_metrics` gives them; each with `step`.
    """
    watch = AlarmWatch(settings)
    for row in rows:
        watch.add(int(row["step"]), row)
    return watch.alarms


def settings_of(config: Mapping[str, Any]) -> AlarmSettings:
    """The section `alarms` of a run's config.yaml; the defaults where an older or newer version wrote another one."""
    try:
        return AlarmSettings.model_validate(config.get("alarms") or {})
    except ValidationError:
        return AlarmSettings()
