"""An evaluation's responses from any engine, and only those that are not there yet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_laser.evaluation.arrivals import Arrival, ArrivalFile
from megatron_laser.rollout.engine import StopEarly
from megatron_laser.types import Generation, Prompt, SamplingParams


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
    arrivals: ArrivalFile
    repeatable: bool
    on_response: Callable[[int, bool], None]
    ends: float
    stop: StopEarly | None = None

    def run(self, batch: Sequence[Prompt], open_prompts: Sequence[Prompt], start: int) -> list[list[Arrival]]:
        """All responses to `open_prompts`, sample after sample.

        Args:
            batch: the prompts of one call of the engine, of which those in `open_prompts` are not done.
            start: place of the batch's first prompt; the batch's random stream depends on it.
        """
        samples = self.sampling.samples_per_prompt
        missing = {prompt.row: self.arrivals.missing(prompt.row, samples) for prompt in open_prompts}
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
        return [self.arrivals.take(prompt.row, samples) for prompt in open_prompts]

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
                if self.arrivals.add(Arrival.of(row, sample, generation)):
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
