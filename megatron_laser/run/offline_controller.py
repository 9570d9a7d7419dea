"""Rank 0's side of a run in which nobody generates: its batches are on the disk or made up, and nothing is evaluated.

No engine, no graders, no data, no cursor: the step alone says which batch it is, so that a checkpoint keeps nothing.
"""

from __future__ import annotations

from typing import Any

from megatron_laser.errors import DataError
from megatron_laser.run.batch_sources import BatchSource, open_source
from megatron_laser.run.controller import Controller
from megatron_laser.run.engines import STOPPED, WorkResult
from megatron_laser.run.recorder import RunRecorder
from megatron_laser.run.speed import Speed


class OfflineController(Controller):
    """A controller whose batches come from a `BatchSource`."""

    def _open(self, resumed: dict[str, Any] | None) -> None:
        config, inputs = self._config, self._inputs
        self._closing.callback(inputs.folder.release)
        self._source: BatchSource = open_source(config, inputs.stop_token_ids, inputs.score_token_id)
        self._ahead = None
        self._speed = Speed(config, None)
        self._last_step = 0 if resumed is None else max(0, int(resumed["step"]))
        self._record = RunRecorder(config, inputs.folder, resumed)
        self._close_later("metrics", self._record.close)

    def collect(self, step: int) -> WorkResult:
        """Read or make the batch of step `step`; "" or why the run has to stop."""
        if self._stop_reason:
            return f"{STOPPED}{self._stop_reason}"
        try:
            self._batch = self._source.batch(step)
        except (DataError, OSError) as error:
            return f"batch of step {step}: {error}"
        return ""

    def servers_busy(self) -> list[tuple[str, float, float]]:
        """There are none."""
        return []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of rank 0: whose run it is."""
        return self._record.state()

    def _progress(self) -> dict[str, float]:
        return self._source.progress(self.batch.step)
