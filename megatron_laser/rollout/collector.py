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
    """Collects graded groups; grading overlaps generation.

    metrics: of the last step. prompts_tried; groups_dropped, those of them that are not in the batch because
    their rewards are all equal; groups_missing, how many of `prompts_per_step` groups with unequal rewards
    were still missing when the tries were used up (0 without dropping).
    """

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
        tries: int | None = None,
        fewest_groups: int = 1,
    ) -> None:
        """
        Args:
            decode: response ids, without the stop token, to the text that is graded.
            deadline: seconds for one step's generation and grading together.
            seed: sampling at step n is seeded by (seed, n): a resumed run samples what it would have sampled.
            tries: drop groups whose rewards are all equal and try further prompts, at most so many in a step
                (`prompts_per_step` or more); None keeps every group.
            fewest_groups: a batch has at least so many, uniform ones if need be (`policy.minibatches`).
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
        self._drops_uniform = tries is not None
        self._tries = prompts_per_step if tries is None else tries
        self._fewest_groups = fewest_groups
        self._said: set[str] = set()
        self.metrics: dict[str, float] = {}

    def collect(self, step: int) -> RolloutBatch:
        """Generate and grade the groups of step `step` (from 1).

        The cursor moves past every prompt that was tried, so a run that is resumed behind this step goes on
        with the next one, and one that is resumed before it tries the same prompts again.

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
        wanted = self._prompts_per_step
        groups: list[Group] = []
        uniform: list[Group] = []
        tried = rounds = 0
        while len(groups) < wanted and tried < self._tries:
            count = min(wanted - len(groups), self._tries - tried)
            for group in self._round(step, rounds, count, ends):
                drop = self._drops_uniform and len({sample.reward for sample in group.samples}) == 1
                (uniform if drop else groups).append(group)
            tried += count
            rounds += 1
        missing = wanted - len(groups)
        if missing:
            groups += self._stand_ins(step, len(groups), uniform)
        self.metrics = {
            "prompts_tried": tried,
            "groups_dropped": tried - len(groups),
            "groups_missing": missing,
        }
        return RolloutBatch(step=step, weight_version=self._engine.version, groups=groups)

    def _stand_ins(self, step: int, found: int, uniform: list[Group]) -> list[Group]:
        """Uniform groups for a step that found too few others; says so once in a run."""
        if found == 0:
            self._say_once(
                "all uniform",
                f"step {step}: the responses to each of {len(uniform)} prompts have one reward (all right or all "
                "wrong); the step trains on the first of them: the verifier's advantages are 0 and only the "
                "self-reward learns",
            )
            return uniform[: self._prompts_per_step]
        self._say_once(
            "too few",
            f"step {step}: {self._tries} prompts (rollout.oversampling_cap) gave {found} groups with unequal "
            f"rewards, not {self._prompts_per_step}; the step trains on those. groups_missing counts them",
        )
        return uniform[: max(0, self._fewest_groups - found)]

    def _say_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s (said once)", message)

    def _round(self, step: int, round_number: int, count: int, ends: float) -> list[Group]:
        """The graded groups of the cursor's next `count` prompts."""
        prompts = [self._prompts[position] for position, _ in self._cursor.take(count)]
        texts: dict[tuple[int, int], str] = {}
        grades: dict[tuple[int, int], Future[Grade]] = {}

        def on_finished(prompt: int, sample: int, generation: Generation) -> None:
            text = self._text(generation)
            texts[prompt, sample] = text
            grades[prompt, sample] = self._grading.submit(text, prompts[prompt].answer)

        sampling = _with_seed(self._sampling, self._seed, step, round_number)
        with self._timers("generate"):
            generations = self._engine.generate(
                [prompt.token_ids for prompt in prompts],
                sampling,
                deadline=max(0.1, ends - time.monotonic()),
                on_finished=on_finished,
            )
        groups = []
        with self._timers("grade"):
            for index, (prompt, responses) in enumerate(zip(prompts, generations)):
                group = Group(prompt, [])
                for number, generation in enumerate(responses):
                    grade = self._grade(grades[index, number], step, ends)
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
                groups.append(group)
        return groups

    def _grade(self, future: Future[Grade], step: int, ends: float) -> Grade:
        try:
            return future.result(timeout=max(0.1, ends - time.monotonic()))
        except TimeoutError:
            raise TimeoutError(
                f"step {step}: responses were not graded within rollout.deadline {self._deadline:g} s of the "
                "step's start; raise it, or reward.workers, or lower reward.deadline"
            ) from None

    def _text(self, generation: Generation) -> str:
        ids = generation.response_ids
        stopped = generation.finish_reason == "stop"
        return self._decode(ids[:-1] if stopped else ids)


def _with_seed(sampling: SamplingParams, seed: int, step: int, round_number: int) -> SamplingParams:
    # Fields of 31 bits (seed), 10 (round of the step) and 21 (step): no two rounds of a run collide.
    return replace(sampling, seed=(seed % 2**31) * 2**31 + round_number * 2**21 + step)
