"""Where batches come from in a run in which nobody generates: from the disk (`run.mode: train_only`), or made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from megatron_laser.config import RunConfig
from megatron_laser.errors import DataError
from megatron_laser.run.batch_origin import origin_problems
from megatron_laser.run.fake_batches import FakeBatches
from megatron_laser.run.recorded_batches import read_batch, recorded_steps
from megatron_laser.types import RolloutBatch


class BatchSource(Protocol):
    """Gives a batch for each step, the same one whenever it is asked."""

    def batch(self, step: int) -> RolloutBatch:
        """Of step `step`, from 1. Raises DataError where there is none that can be used."""

    def progress(self, step: int) -> dict[str, float]:
        """The epochs that belong to it, as metrics."""


class RecordedBatches:
    """The batches of `run.batches`, in the order of their steps."""

    def __init__(
        self, config: RunConfig, stop_token_ids: tuple[int, ...], score_token_id: int | None
    ) -> None:
        assert config.run.batches is not None
        self._config = config
        self._folder = Path(config.run.batches)
        self._steps = recorded_steps(self._folder)
        self._tokens = (stop_token_ids, score_token_id)
        self._progress: tuple[int, dict[str, float]] = (0, {})

    def batch(self, step: int) -> RolloutBatch:
        """See `BatchSource`: the `step`-th one, which takes on this step."""
        if step > len(self._steps):
            raise DataError(
                f"run.batches {self._folder} has {len(self._steps)} batches, and none for step {step}"
            )
        there = self._steps[step - 1]
        found = read_batch(self._folder, there)
        if problems := origin_problems(self._config, found.origin, *self._tokens):
            raise DataError(f"run.batches {self._folder}, batch of step {there}: {'; '.join(problems)}")
        self._progress = (step, found.progress)
        return replace(found.batch, step=step)

    def progress(self, step: int) -> dict[str, float]:
        """See `BatchSource`; of the batch that was read last."""
        return self._progress[1] if self._progress[0] == step else {}


def open_source(
    config: RunConfig, stop_token_ids: tuple[int, ...], score_token_id: int | None
) -> BatchSource:
    """Where the batches of a run come from in which nobody generates."""
    kind = FakeBatches if config.run.fake.responses else RecordedBatches
    return kind(config, stop_token_ids, score_token_id)
