"""One step's rollout on rank 0: prompts from the cursor, responses from the engine, grades from the pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from megatron_laser.data.cursor import PromptCursor
from megatron_laser.observability.timers import Timers
from megatron_laser.rewards import Grade, GradingPool
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample, SamplingParams

logger = logging.getLogger(__name__)


class RolloutCollector:
    """Collects graded groups; grading overlaps generation."""

    def __init__(
        self,
        engine: RolloutEngine,
        grading: GradingPool,
        prompts: Sequence[Prompt],
        cursor: PromptCursor,
        *,
        sampling: SamplingParams,
        prompts_per_step: int,
        decode: Callable[[list[int]], str],
        deadline: float,
        seed: int,
        timers: Timers,
    ) -> None:
        """
        Args:
            decode: response ids, without the stop token, to the text that is graded.
            deadline: seconds for one step's generation and grading together.
            seed: sampling at step n is seeded by (seed, n): a resumed run samples what it would have sampled.
        """
        self._engine = engine
        self._grading = grading
        self._prompts = prompts
        self._cursor = cursor
        self._sampling = sampling
        self._prompts_per_step = prompts_per_step
        self._decode = decode
        self._deadline = deadline
        self._seed = seed
        self._timers = timers

    def collect(self, step: int) -> RolloutBatch:
        """Generate and grade the groups of step `step` (from 1).

        Raises:
            RuntimeError: the engine holds other weights than those of step - 1.
            TimeoutError: generation or grading passed the deadline.
        """
        if self._engine.version != step - 1:
            raise RuntimeError(
                f"step {step}: the engine holds weight version {self._engine.version}, expected {step - 1}; "
                "the last weight sync did not reach it"
            )
        ends = time.monotonic() + self._deadline
        taken = self._cursor.take(self._prompts_per_step)
        prompts = [self._prompts[position] for position, _ in taken]
        texts: dict[tuple[int, int], str] = {}
        grades: dict[tuple[int, int], Future[Grade]] = {}

        def on_finished(prompt: int, sample: int, generation: Generation) -> None:
            text = self._text(generation)
            texts[prompt, sample] = text
            grades[prompt, sample] = self._grading.submit(text, prompts[prompt].answer)

        sampling = _with_seed(self._sampling, self._seed, step)
        with self._timers("generate"):
            generations = self._engine.generate(
                [prompt.token_ids for prompt in prompts],
                sampling,
                deadline=self._deadline,
                on_finished=on_finished,
            )
        batch = RolloutBatch(step=step, weight_version=self._engine.version)
        with self._timers("grade"):
            for index, (prompt, responses) in enumerate(zip(prompts, generations)):
                group = Group(prompt, [])
                for number, generation in enumerate(responses):
                    grade = grades[index, number].result(timeout=max(0.1, ends - time.monotonic()))
                    group.samples.append(
                        Sample(
                            prompt_ids=prompt.token_ids,
                            generation=generation,
                            text=texts[index, number],
                            scored=generation.is_scored(sampling.stop_token_ids),
                            reward=grade.reward,
                            outcome=grade.outcome,
                            zc_logprob=generation.zc_logprob,
                        )
                    )
                batch.groups.append(group)
        return batch

    def _text(self, generation: Generation) -> str:
        ids = generation.response_ids
        stopped = generation.finish_reason == "stop"
        return self._decode(ids[:-1] if stopped else ids)


def _with_seed(sampling: SamplingParams, seed: int, step: int) -> SamplingParams:
    # Two 31-bit halves: steps and seeds never collide.
    return replace(sampling, seed=(seed % 2**31) * 2**31 + step)
