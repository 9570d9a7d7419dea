"""Responses on disk as they arrive: what an evaluation that was killed goes on from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_laser.types import FinishReason, Generation


@dataclass(frozen=True, slots=True)
class Arrival:
    """One response as the engine gave it, before grading.

    Attributes:
        row: of the problem in its data files. sample: of the response, from 0.
        response_ids: token ids, the stop token included; never re-tokenised text.
        mean_logprob: over the response's tokens; None without any.
        zc_logprob: where the engine returned it with the response.
    """

    row: int
    sample: int
    response_ids: list[int]
    finish_reason: FinishReason
    mean_logprob: float | None
    zc_logprob: float | None

    @staticmethod
    def of(row: int, sample: int, generation: Generation) -> Arrival:
        """What is kept of a generation."""
        logprobs = generation.logprobs
        return Arrival(
            row=row,
            sample=sample,
            response_ids=list(generation.response_ids),
            finish_reason=generation.finish_reason,
            mean_logprob=math.fsum(logprobs) / len(logprobs) if logprobs else None,
            zc_logprob=generation.zc_logprob,
        )

    def is_scored(self, stop_token_ids: tuple[int, ...]) -> bool:
        """See `Generation.is_scored`."""
        return Generation(self.response_ids, [], self.finish_reason, 0).is_scored(stop_token_ids)


def arrivals_path(records_path: Path, identity: Mapping[str, Any]) -> Path:
    """Where an evaluation that keeps its responses only until it is finished has them; drops those of others.

    Args:
        identity: what the responses depend on, as JSON can hold it; a part of the name.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = records_path.with_name(f"{records_path.stem}.{digest}.partial")
    for other in records_path.parent.glob(f"{records_path.stem}.*.partial"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


class ArrivalFile:
    """Arrivals by (row, sample), appended to a file line by line; in memory only without a path.

    A line that a kill cut off is dropped when the file is opened. Thread-safe.
    """

    def __init__(self, path: Path | None, *, skip_rows: Container[int] = ()) -> None:
        """Open the file and read what is there, but for the rows in `skip_rows`.

        Raises:
            ValueError: a line other than the last is no arrival; names it.
        """
        self._lock = threading.Lock()
        self._arrivals: dict[tuple[int, int], Arrival] = {}
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                arrival = Arrival(**json.loads(line))
            except (ValueError, TypeError) as error:
                self._file.close()
                raise ValueError(f"{path} line {number} is not a saved response: {error}") from error
            good += len(line)
            if arrival.row not in skip_rows:
                self._arrivals.setdefault((arrival.row, arrival.sample), arrival)
        self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)

    def add(self, arrival: Arrival) -> bool:
        """Keep an arrival and write it down at once; False, and nothing done, where there is one already."""
        line = json.dumps(asdict(arrival)).encode() + b"\n"
        with self._lock:
            if (arrival.row, arrival.sample) in self._arrivals:
                return False
            if self._file is not None:
                self._file.write(line)
                self._file.flush()  # to the kernel: what a killed process has written stays
            self._arrivals[arrival.row, arrival.sample] = arrival
            return True

    def lengths(self) -> list[int]:
        """Tokens of each arrival in memory."""
        with self._lock:
            return [len(arrival.response_ids) for arrival in self._arrivals.values()]

    def missing(self, row: int, samples: int) -> list[int]:
        """The samples of a row, of 0 .. samples - 1, that are not there yet."""
        with self._lock:
            return [sample for sample in range(samples) if (row, sample) not in self._arrivals]

    def take(self, row: int, samples: int) -> list[Arrival]:
        """The row's arrivals in order; they leave the memory, not the file.

        Raises:
            KeyError: one is missing.
        """
        with self._lock:
            return [self._arrivals.pop((row, sample)) for sample in range(samples)]

    def __enter__(self) -> ArrivalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
