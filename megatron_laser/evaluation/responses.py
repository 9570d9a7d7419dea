"""An evaluation's responses: those that are missing sampled from any engine, and all kept on disk as they arrive.

That is what an evaluation that was killed goes on from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_laser.rollout.engine import StopEarly
from megatron_laser.types import FinishReason, Generation, Prompt, SamplingParams


@dataclass(frozen=True, slots=True)
class SavedResponse:
    """One response as the engine gave it, before grading.

    Attributes:
        row: of the problem in its data files. sample: of the response, from 0.
        response_ids: token ids, the stop token included; never re-tokenised text.
        mean_logprob: over the response's tokens; None without any.
        zc_logprob: where the engine returned it with the response.
        prefix_reads: the same of its prefixes, see `Generation`.
    """

    row: int
    sample: int
    response_ids: list[int]
    finish_reason: FinishReason
    mean_logprob: float | None
    zc_logprob: float | None
    prefix_reads: list[float] | None = None

    @staticmethod
    def of(row: int, sample: int, generation: Generation) -> SavedResponse:
        """What is kept of a generation."""
        logprobs = generation.policy_logprobs.tolist()
        return SavedResponse(
            row=row,
            sample=sample,
            response_ids=generation.response_ids.tolist(),
            finish_reason=generation.finish_reason,
            mean_logprob=math.fsum(logprobs) / len(logprobs) if logprobs else None,
            zc_logprob=generation.zc_logprob,
            prefix_reads=None if generation.prefix_reads is None else list(generation.prefix_reads),
        )

    @property
    def text_ids(self) -> list[int]:
        """See `Generation.text_ids`."""
        return self.response_ids[:-1] if self.finish_reason == "stop" else self.response_ids

    @property
    def was_ended(self) -> bool:
        """Whether it was ended for its prefix's score, see `early_ending`."""
        return self.finish_reason == "ended"

    def is_scored(self, stop_token_ids: tuple[int, ...]) -> bool:
        """See `Generation.is_scored`."""
        ended = self.finish_reason == "stop" and len(self.response_ids) > 0
        return ended and self.response_ids[-1] in stop_token_ids


def partial_responses_path(records_path: Path, identity: Mapping[str, Any]) -> Path:
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


class ResponseFile:
    """Responses by (row, sample), appended to a file line by line; in memory only without a path.

    A line that a kill cut off is dropped when the file is opened. Thread-safe.
    """

    def __init__(self, path: Path | None, *, skip_rows: Container[int] = ()) -> None:
        """Open the file and read what is there, but for the rows in `skip_rows`.

        Raises:
            ValueError: a line other than the last is no saved response; names it.
        """
        self._lock = threading.Lock()
        self._responses: dict[tuple[int, int], SavedResponse] = {}
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
                response = SavedResponse(**json.loads(line))
            except (ValueError, TypeError) as error:
                self._file.close()
                raise ValueError(f"{path} line {number} is not a saved response: {error}") from error
            good += len(line)
            if response.row not in skip_rows:
                self._responses.setdefault((response.row, response.sample), response)
        self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)

    def add(self, response: SavedResponse) -> bool:
        """Keep a response and write it down at once; False, and nothing done, where there is one already."""
        fields = asdict(response)
        if response.prefix_reads is None:  # as in files of earlier versions
            del fields["prefix_reads"]
        line = json.dumps(fields).encode() + b"\n"
        with self._lock:
            if (response.row, response.sample) in self._responses:
                return False
            if self._file is not None:
                self._file.write(line)
                self._file.flush()  # to the kernel: what a killed process has written stays
            self._responses[response.row, response.sample] = response
            return True

    def lengths(self) -> list[int]:
        """Tokens of each response in memory."""
        with self._lock:
            return [len(response.response_ids) for response in self._responses.values()]

    def missing(self, row: int, samples: int) -> list[int]:
        """The samples of a row, of 0 .. samples - 1, that are not there yet."""
        with self._lock:
            return [sample for sample in range(samples) if (row, sample) not in self._responses]

    def take(self, row: int, samples: int) -> list[SavedResponse]:
        """The row's responses in order; they leave the memory, not the file.

        Raises:
            KeyError: one is missing.
        """
        with self._lock:
            return [self._responses.pop((row, sample)) for sample in range(samples)]

    def __enter__(self) -> ResponseFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


class EvaluationEngine(Protocol):
    """The part of `rollout.RolloutEngine` that an evaluation needs."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Callable[[int, int, Generation], None] | None = None,
        stop: StopEarly | None = None,
    ) -> list[list[Generation]]:
        """`samples_per_prompt` responses for each prompt, in order; `on_finished` hears of each at once."""
        ...

    def score(self, sequences: Sequence[Sequence[int]], token_id: int, *, deadline: float) -> list[float]:
        """log pi(token_id | sequence) at temperature 1."""
        ...


@dataclass(frozen=True, slots=True)
class Sampler:
    """Asks the engine for what is missing; the fields are those of `evaluate`."""

    engine: EvaluationEngine
    sampling: SamplingParams
    score_token_id: int | None
    responses: ResponseFile
    repeatable: bool
    on_response: Callable[[int, bool], None]
    ends: float
    stop: StopEarly | None = None

    def run(
        self, batch: Sequence[Prompt], open_prompts: Sequence[Prompt], start: int
    ) -> list[list[SavedResponse]]:
        """All responses to `open_prompts`, sample after sample.

        Args:
            batch: the prompts of one call of the engine, of which those in `open_prompts` are not done.
            start: place of the batch's first prompt; the batch's random stream depends on it.
        """
        samples = self.sampling.samples_per_prompt
        missing = {prompt.row: self.responses.missing(prompt.row, samples) for prompt in open_prompts}
        count = sum(map(len, missing.values()))
        if count:
            sampling = replace(self.sampling, score_token_id=self.score_token_id)
            if self.repeatable or count == samples * len(batch):
                places = [(prompt.row, sample) for prompt in batch for sample in range(samples)]
                self._generate(batch, sampling, places, wanted=missing, start=start, attempt=0)
            else:
                single = [(prompt, sample) for prompt in open_prompts for sample in missing[prompt.row]]
                places = [(prompt.row, sample) for prompt, sample in single]
                self._generate(
                    [prompt for prompt, _ in single],
                    replace(sampling, samples_per_prompt=1),
                    places,
                    wanted=missing,
                    start=start,
                    # not the stream of the responses that are there
                    attempt=samples * len(batch) - count,
                )
        return [self.responses.take(prompt.row, samples) for prompt in open_prompts]

    def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        places: list[tuple[int, int]],
        *,
        wanted: dict[int, list[int]],
        start: int,
        attempt: int,
    ) -> None:
        """One call of the engine; `places` are (row, sample) of its responses in order."""
        if sampling.seed is not None:
            sampling = replace(sampling, seed=stream_seed(sampling.seed, start, attempt))
        per_prompt = sampling.samples_per_prompt
        failures: list[BaseException] = []

        def on_finished(prompt: int, number: int, generation: Generation) -> None:
            row, sample = places[prompt * per_prompt + number]
            if sample not in wanted.get(row, ()):
                return
            try:
                if self.responses.add(SavedResponse.of(row, sample, generation)):
                    self.on_response(len(generation.response_ids), True)
            except OSError as error:  # a full disk; the engine's thread must not be the one to find out
                failures.append(error)

        left = self.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time was left to generate")
        groups = self.engine.generate(
            [prompt.token_ids for prompt in prompts],
            sampling,
            deadline=left,
            on_finished=on_finished,
            stop=self.stop,
        )
        if failures:
            raise failures[0]
        counts = [len(group) for group in groups]
        if counts != [per_prompt] * len(prompts):
            raise RuntimeError(
                f"the engine returned {counts} responses for {len(prompts)} prompts; expected {per_prompt} for each"
            )
        for prompt, group in enumerate(groups):  # an engine may call back for none or for some
            for number, generation in enumerate(group):
                on_finished(prompt, number, generation)
        if failures:
            raise failures[0]


def generation_batch(*, in_process: bool, max_batch_size: int, max_concurrency: int) -> int:
    """Responses to ask an engine for in one call.

    In this process what runs at once; servers want so many that they are busy to the end, not one batch after the
    other, each with the wait for its longest response.
    """
    return max_batch_size if in_process else max(2048, 8 * max_concurrency)


def stream_seed(seed: int, start: int, attempt: int) -> int:
    """The seed of one call: a stream of its own for each batch, and for each attempt to complete it."""
    if attempt == 0:
        return (seed % 2**31) * 2**31 + start
    digest = hashlib.sha256(f"{seed} {start} {attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
