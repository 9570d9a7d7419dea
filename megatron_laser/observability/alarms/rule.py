"""What an alarm is made of: what it looks at, what it usually means, and where to look.

An alarm's name is that of its limit in the section `alarms` of the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_laser.config.schema.alarms import AlarmSettings
from megatron_laser.observability.alarms.judges import Judge

Window = tuple[int, int]
FEW_MEASUREMENTS: Window = (2, 3)  # of what is measured now and then
QUICK: Window = (3, 5)  # of what does its harm within steps


@dataclass(frozen=True)
class Rule:
    """One alarm.

    Attributes:
        title: in a few words.
        subject: what the numbers of a message are of, with its unit in words.
        form: format of these numbers.
        metrics: where its numbers are, the first one is the one to plot.
        means: what it usually means, and what helps.
        page: the part of the documentation to read, below docs/.
        command: what to type next; RUN is the output folder.
        judge: (limit, settings) -> the judge of its rows.
        window: (needed, of): rows beyond the limit, of the last ones that say something; None: the settings' own.
        rows: what these rows are.
    """

    name: str
    title: str
    subject: str
    form: str
    metrics: tuple[str, ...]
    means: str
    page: str
    command: str
    judge: Callable[[float, AlarmSettings], Judge]
    window: Callable[[float, AlarmSettings], Window] | None = None
    rows: str = "steps"

    def limit(self, settings: AlarmSettings) -> float:
        """The setting of its name; 0 is off."""
        return float(getattr(settings, self.name) or 0.0)

    def needed_of(self, settings: AlarmSettings) -> Window:
        """How many of how many rows have to be beyond the limit."""
        own = (settings.needed, settings.window)
        return own if self.window is None else self.window(self.limit(settings), settings)

    @property
    def place(self) -> str:
        """Where to look, in a line."""
        names = ", ".join(self.metrics)
        return f"{names} in metrics.jsonl; docs/{self.page}; {self.command}"


INSPECT = "python tools/inspect_rollouts.py RUN"
REPORT = "megatron-laser report RUN"
CHECK = "megatron-laser check RUN/config.yaml"
