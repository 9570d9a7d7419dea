"""Warnings and errors that are logged while a run goes on, as events of the run and as lines with its step.

Those who log are layers apart, and some may import nothing of a run (the log-prob op, the graders): they log, as they
do everywhere, and here it becomes a part of what is known of the run. Rank 0 only: the other ranks log errors alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType

from megatron_laser.observability.events import EventLog, Kind

_PACKAGE = __name__.split(".", maxsplit=1)[0]

KINDS: dict[str, Kind] = {
    # What is done in another way from then on, or not any more.
    "ops.memory": "fallback",
    "observability.best_effort": "fallback",
    "observability.metrics_logger": "fallback",
    "observability.wandb_sink": "fallback",
    "run.profiling": "fallback",
    "rollout.client.driver": "fallback",
    "rollout.client.load_watch": "fallback",
    "rollout.client.router": "fallback",
    "rollout.client.slots": "fallback",
    "weight_sync.checksums": "fallback",
    "weight_sync.group": "fallback",
    # Servers, and what is sent to them.
    "rollout.client": "server",
    "run.engines": "server",
    "weight_sync": "server",
    # The code that grades, and its processes.
    "rewards": "reward",
    "evaluation": "evaluation",
    "trainer.bad_steps": "skipped",
    "trainer.checkpoint": "checkpoint",
}
"""Kind of what a module, or all of a folder, logs as a warning or an error; others: "warning"."""


def kind_of(logger: str) -> Kind:
    """By the longest name in `KINDS` that the logger's begins with."""
    name = logger.removeprefix(f"{_PACKAGE}.")
    while name:
        if name in KINDS:
            return KINDS[name]
        name = name.rpartition(".")[0]
    return "warning"


class LifeLog(logging.Handler):
    """Makes events of warnings and errors of this package, between `__enter__` and `__exit__`.

    With a live view the line goes above it, and not through it to where the log goes; else the log's own line gets
    the step that is being done.
    """

    def __init__(self, events: EventLog, show: Callable[[str], object] | None) -> None:
        """Args: show: prints a line above a live view; None: there is none."""
        super().__init__(logging.WARNING)
        self._events = events
        self._show = show
        self._screens: list[logging.Handler] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See the class. A fault here must not end what was only to be told."""
        try:
            text = " ".join(record.getMessage().split())
            kind, step = kind_of(record.name), self._events.step
            told = text.removeprefix(f"step {step}: ")
            self._events.add(kind, told)
            label = kind if kind in ("fallback", "warning") else record.levelname.lower()
            if self._show is not None:
                self._show(f"step {step}: {label}: {told}")
                record.__dict__["shown"] = True
            elif not text.startswith("step "):
                record.msg, record.args = f"step {step}: {text}", ()
        except Exception:
            self.handleError(record)

    def __enter__(self) -> LifeLog:
        logging.getLogger(_PACKAGE).addHandler(self)
        if self._show is not None:
            screens = [one for one in logging.getLogger().handlers if type(one) is logging.StreamHandler]
            self._screens = [one for one in screens if getattr(one.stream, "isatty", bool)()]
        for handler in self._screens:
            handler.addFilter(_not_shown)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        logging.getLogger(_PACKAGE).removeHandler(self)
        for handler in self._screens:
            handler.removeFilter(_not_shown)
        self._screens = []


def _not_shown(record: logging.LogRecord) -> bool:
    return not getattr(record, "shown", False)
