"""What a run makes of its evaluations: which is the best so far, and whether it is time to end. Pure, on rank 0."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config.schema.root import RunConfig
from megatron_laser.observability import events
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint.best import STATE, Best, read_best

logger = logging.getLogger(__name__)

_EARLY = "early_stop"


@dataclass(frozen=True, slots=True)
class Judged:
    """What follows from a step's evaluation: it is the best so far; why the run ends here, "" if it goes on."""

    best: bool = False
    stop: str = ""

    @staticmethod
    def from_text(text: str) -> Judged:
        """The inverse of `text`; "" is neither."""
        return Judged(**json.loads(text)) if text else Judged()

    @property
    def text(self) -> str:
        """For other ranks."""
        return json.dumps(asdict(self)) if self.best or self.stop else ""


@dataclass(frozen=True, slots=True)
class End:
    """After which step a run has ended of itself; early: why before `run.steps`, "" where it did all of them."""

    step: int
    early: str


class Keeping:
    """Judges each evaluation of the validation split; what it has to remember goes into the checkpoint.

    An evaluation without the metric (or where it is NaN) does not count, which is said. So does that of step 0: the
    initial model is at model.path.
    """

    def __init__(self, config: RunConfig, resumed: Mapping[str, Any] | None) -> None:
        """Args: resumed: rank 0's part of the checkpoint's state, None for a fresh start."""
        self._best_by, self._early = config.checkpoint.best, config.run.early_stop
        self._output, self._root = Path(config.run.output_dir), folders.checkpoint_root(config)
        self._best: Best | None = None
        # value: the best before; count: evaluations since then.
        self._waiting: dict[str, Any] = {}
        self._new_best = False
        state = resumed or {}
        if self._best_by.metric is not None:
            self._best = self._earlier(Best.of(state.get(STATE)))
        waiting = state.get(_EARLY)
        same = {"metric": self._early.metric, "mode": self._early.mode}
        if self._early.metric is not None and isinstance(waiting, Mapping):
            self._waiting = dict(waiting) if same.items() <= dict(waiting).items() else {}

    def _earlier(self, best: Best | None) -> Best | None:
        """The best of the run as it was saved, if it is by today's metric and its checkpoint is there."""
        best = self._if_there(best)
        asked = (self._best_by.metric, self._best_by.mode)
        return best if best is not None and (best.metric, best.mode) == asked else None

    def _if_there(self, best: Best | None) -> Best | None:
        """`best` if its checkpoint is there or is being written, else the one that best.json names, else None."""
        there = {step for step, _ in folders.published(self._root)}
        if best is None or best.step in there or folders.partial_folder(self._root, best.step).is_dir():
            return best
        named = read_best(self._output)
        lost, best = best, named if named and named.step in there and named.step < best.step else None
        logger.warning(
            "the checkpoint of step %d, the best by %s, is not in %s: %s",
            *(lost.step, lost.metric, self._root),
            "the best counts from here" if best is None else f"that of step {best.step} is the best now",
        )
        return best

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the evaluation of `step`."""
        self._new_best = False
        if step < 1:
            return
        # Often one metric for both: what is wrong with it is said once.
        asked = dict.fromkeys((self._best_by.metric, self._early.metric))
        values = {metric: self._value(metric, step, metrics) for metric in asked}
        if (value := values[self._best_by.metric]) is not None:
            best = self._best = self._if_there(self._best)  # a save that failed leaves the one before
            if best is None or _gain(value, best.value, self._best_by.mode) > 0:
                self._new_best = True
                self._best = Best(step, str(self._best_by.metric), self._best_by.mode, value)
                before = "" if best is None else f" (before: {best.value:.4g} after step {best.step})"
                text = f"{self._best_by.metric} {value:.4g} after step {step} is the best so far{before}"
                events.note("evaluation", text, step)
        if (value := values[self._early.metric]) is not None:
            before_it = self._waiting.get("value")
            better = before_it is None or _gain(value, before_it, self._early.mode) > self._early.min_delta
            self._waiting = {
                "metric": self._early.metric,
                "mode": self._early.mode,
                "value": value if better else before_it,
                "step": step if better else self._waiting["step"],
                "count": 0 if better else self._waiting["count"] + 1,
            }

    def judged(self) -> Judged:
        """What follows from the evaluation that was just taken in, or from the state that was resumed from.

        An evaluation is called the best once.
        """
        waiting, stop = self._waiting, ""
        best, self._new_best = self._new_best, False
        if waiting and waiting["count"] >= self._early.patience:
            stop = (
                f"{self._early.metric} has not been better than {waiting['value']:.4g} of step {waiting['step']} in "
                f"{waiting['count']} evaluation{'s' if waiting['count'] > 1 else ''} "
                f"(run.early_stop.patience {self._early.patience})"
            )
        return Judged(best, stop)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; {} where nothing is judged."""
        kept: dict[str, Any] = {} if self._best is None else {STATE: asdict(self._best)}
        return kept | ({_EARLY: dict(self._waiting)} if self._waiting else {})

    def _value(self, metric: str | None, step: int, metrics: Mapping[str, float]) -> float | None:
        if metric is None:
            return None
        value = metrics.get(metric)
        if value is None or not math.isfinite(value):
            logger.warning(
                "the evaluation after step %d has no %s%s; it does not count for what is the best",
                *(step, metric, "" if value is None else f" ({value})"),
            )
            return None
        return float(value)


def _gain(value: float, before: float, mode: str) -> float:
    """By how much `value` is better."""
    return value - before if mode == "max" else before - value
