"""Rollouts one step ahead: the next batch is collected in a thread while this one is trained.

Weights change only while nothing is generated, so a batch comes from one version, that of the step before the last.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_laser.rollout.client.errors import WeightsNeeded
from megatron_laser.rollout.collector import RolloutCollector
from megatron_laser.rollout.engine import StopEarly, StoppedEarly
from megatron_laser.rollout.pending import batch_from, batch_state
from megatron_laser.types import Prompt, RolloutBatch


class RolloutAhead:
    """A collector whose `collect` may have been begun earlier."""

    def __init__(self, collector: RolloutCollector, prompts: Sequence[Prompt]) -> None:
        self._collector = collector
        self._prompts = list(prompts)
        self._positions = {prompt.row: position for position, prompt in enumerate(self._prompts)}
        self._thread: threading.Thread | None = None
        self._ready: RolloutBatch | None = None
        self._error: BaseException | None = None
        self._step = 0

    def begin(self, step: int) -> None:
        """Collect `step` in the background, unless it is there."""
        if self._thread is not None or (self._ready is not None and self._ready.step == step):
            return
        self._step = step
        self._thread = threading.Thread(
            target=self._work, args=(step,), name=f"rollout of step {step}", daemon=True
        )
        self._thread.start()

    def wait(self, deadline: float) -> None:
        """Until nothing is collected any more; errors come out of `collect`.

        Raises TimeoutError after `deadline` seconds.
        """
        if self._thread is None:
            return
        self._thread.join(timeout=deadline)
        if self._thread.is_alive():
            raise TimeoutError(
                f"the rollout of step {self._step}, ahead of training, took more than {deadline:g} s"
            )
        self._thread = None

    def collect(self, step: int, stop: StopEarly | None = None) -> RolloutBatch:
        """The batch of `step`; raises what collecting it raised, and then a further call goes on.

        Weights that were needed have been sent since, with those of the step before: that is no error any more.
        After StoppedEarly what was collected ahead is still there, for `state`.
        """
        if stop is not None and stop.is_set:
            raise StoppedEarly(f"stopped before step {step}")
        error, self._error = self._error, None
        if error is not None and not isinstance(error, WeightsNeeded):
            raise error
        ready, self._ready = self._ready, None
        if ready is not None and ready.step == step:
            return ready
        return self._collector.collect(step, stop=stop)

    def state(self) -> dict[str, Any]:
        """The collector's state and a batch that is ready, as JSON values. Call while nothing is collected."""
        ahead = None if self._ready is None else batch_state(self._ready, self._positions)
        return self._collector.state() | {"ahead": ahead}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        kept = state.get("ahead") is not None and self._collector.same_sampling(state)
        self._collector.load_state({**state, "ahead": None} if kept else state)
        if kept:
            self._ready = batch_from(state["ahead"], self._prompts)

    def close(self) -> None:
        """Give a running collection a moment to notice that its engine is closed."""
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _work(self, step: int) -> None:
        try:
            self._ready = self._collector.collect(step)
        except BaseException as error:
            self._error = error
