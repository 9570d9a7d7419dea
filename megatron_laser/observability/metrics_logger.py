"""Where a run's metrics go: metrics.jsonl always, TensorBoard and wandb beside it."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_laser.files import plain, write_atomically
from megatron_laser.observability.best_effort import BestEffort
from megatron_laser.observability.metric_groups import dashboard_metrics
from megatron_laser.observability.wandb_sink import WandbSink

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Writes `output_dir`/metrics.jsonl and `output_dir`/tensorboard.

    An existing metrics.jsonl is continued, so a resumed run keeps what it had written.

    Attributes:
        unwritten: lines that could not be written, for the next start to write. TensorBoard that fails is switched off.
    """

    def __init__(
        self,
        output_dir: Path,
        tensorboard: bool = True,
        *,
        last_step: int | None = None,
        unwritten: Sequence[str] = (),
        wandb: WandbSink | None = None,
        all_metrics: bool = False,
    ) -> None:
        """Open the files. Without the tensorboard package: one warning, and metrics.jsonl only.

        Args:
            wandb: see `open_wandb`; closed with the files.
            last_step: the step of the checkpoint that is resumed from; lines of later steps are cut off, since
                the run will write them again.
            unwritten: lines that an earlier start could not write.
            all_metrics: TensorBoard and wandb get every number, not those of `metric_groups` alone that are looked at.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = path = output_dir / "metrics.jsonl"
        self.unwritten: list[str] = []
        if last_step is not None and path.exists():
            _cut_back(path, last_step)
        cut_off = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        # Without a buffer: what a full disk did not take must not be tried again when the file is closed.
        self._file = path.open("ab", buffering=0)
        if cut_off:  # a run that was killed while writing: its last line must not swallow our first
            self._append("\n")
        for line in unwritten:
            self._append(line)
        purge = None if last_step is None else last_step + 1
        self._tensorboard = BestEffort(
            "logging.tensorboard", Exception
        )  # its writing thread passes on whatever it met
        self._writer: Any = None
        if tensorboard:
            self._tensorboard(lambda: self._open_tensorboard(output_dir / "tensorboard", purge))
        self._wandb = wandb
        self._all_metrics = all_metrics

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and flush it; the line is there even if the run dies in the next step.

        Args:
            metrics: flat; numbers, 0-d arrays and tensors, or lists of numbers (these are not sent to
                TensorBoard or wandb). NaN and infinities are written as null.

        Raises:
            TypeError: a value is something else, such as a nested dict; names the metric.
            OSError: metrics.jsonl cannot be written; the line is in `unwritten`, the file as before.
        """
        line: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            try:
                line[name] = plain(value)
            except TypeError as error:
                raise TypeError(f"metric {name!r}: {error}; metrics are flat") from None
        shown = dashboard_metrics(line, every=self._all_metrics)
        self._scalars(step, shown)
        if self._wandb is not None:
            self._wandb.log(step, shown)
        text = json.dumps(line) + "\n"
        try:
            if not self._there():
                raise FileNotFoundError(f"{self.path} was deleted or replaced")
            self._append(text)
        except OSError:
            self.unwritten.append(text)
            raise

    def histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        """Named distributions, to TensorBoard only; an empty one is left out."""

        def add() -> None:
            for name, entries in values.items():
                if len(entries):
                    self._writer.add_histogram(name, np.asarray(entries, dtype=np.float64), step)

        if self._writer is not None:
            self._tensorboard(add)

    def close(self) -> None:
        """Close all of them; may be called again."""
        self._file.close()
        if self._writer is not None:
            self._tensorboard(self._writer.close)
            self._writer = None
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def _scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        def add() -> None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

        if self._writer is not None:
            self._tensorboard(add)

    def _open_tensorboard(self, folder: Path, purge_step: int | None) -> None:
        self._writer = _tensorboard_writer(folder, purge_step)

    def _append(self, text: str) -> None:
        """All of `text` at the end of the file and on the disk, or the file as before and OSError."""
        size = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(text.encode())
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())  # network file systems say only now that they have no room
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), size)
            raise

    def _there(self) -> bool:
        """Whether `path` is still the file that is written to."""
        with suppress(OSError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        return False

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order of steps; null is read as NaN.

    Lines of the same step are merged and later values win: a resumed run repeats the steps after its
    checkpoint. A line that a killed run left incomplete is skipped with a warning.
    """
    rows: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s line %d is not a line of metrics and is skipped: %.60s", path, number, text)
            continue
        values = {name: math.nan if value is None else value for name, value in line.items()}
        rows.setdefault(step, {}).update(values)
    return [rows[step] for step in sorted(rows)]


def _cut_back(path: Path, last_step: int) -> None:
    """Keep the lines up to `last_step`; what a killed run left incomplete goes too."""
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = int(json.loads(text)["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if step <= last_step:
            kept.append(text + "\n")
    write_atomically(path, "".join(kept))


def _tensorboard_writer(folder: Path, purge_step: int | None) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        logger.warning(
            "logging.tensorboard is true but TensorBoard cannot be imported (%s); metrics go to "
            "metrics.jsonl only. Install the tensorboard package, or set logging.tensorboard=false",
            error,
        )
        return None
    _quiet_writer_threads()
    return SummaryWriter(log_dir=str(folder), purge_step=purge_step)


@cache
def _quiet_writer_threads() -> None:
    """TensorBoard's thread dies of a full disk with a traceback; the next write hears of it and says it in a line."""
    earlier = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard"):
            earlier(arguments)

    threading.excepthook = hook
