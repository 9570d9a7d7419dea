"""One step's rollout on rank 0: prompts from the cursor, responses from the engine, grades from the pool."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_laser.data.cursor import Cursor
from megatron_laser.observability.rates import GENERATED
from megatron_laser.observability.timers import Timers
from megatron_laser.rewards import Facts, GradingPool, GradingPoolError
from megatron_laser.rewards.grade import FAILED_OUTCOMES, NOT_ONE_GRADED
from megatron_laser.rollout.endings import Endings
from megatron_laser.rollout.engine import ResumableEngine, RolloutEngine, StopEarly, StoppedEarly, watched
from megatron_laser.rollout.function.runner import (
    FailureKind,
    FunctionFailed,
    SampleFunction,
    failed_outcome,
    failure_counts,
)
from megatron_laser.rollout.pending import EMPTY, OpenGroup, restore
from megatron_laser.rollout.progress import Progress, sampled_tokens, staleness_metrics
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, SamplingParams

logger = logging.getLogger(__name__)


class RolloutCollector:
    """Collects graded groups; grading overlaps generation.

    metrics: of the last step. prompts_tried; groups_dropped, those of them that are not in the batch because their
    rewards are all equal, and what else `Progress.graded_metrics` says; groups_missing, how many of
    `prompts_per_step` groups with unequal rewards were still missing when the tries were used up (0 without
    dropping); grading_failed, the responses that could not be graded (time-outs and crashes), on which the step does
    not train. With a function also function_failed_timeout, _error and _invalid, the samples that it did not make, on
    which the step does not train either. With a resumable engine also groups_carried (begun, and going on in the next
    step), the age of the tokens, and what the engine counts.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        grading: GradingPool,
        prompts: Sequence[Prompt],
        cursor: Cursor,
        *,
        sampling: SamplingParams,
        prompts_per_step: int,
        decode: Callable[[list[int]], str],
        deadline: float,
        seed: int,
        timers: Timers,
        tries: int | None = None,
        fewest_groups: int = 1,
        oversample: float = 1.0,
        max_staleness: int = 0,
        ahead: int = 0,
        frozen: bool = False,
        endings: Endings | None = None,
        function: SampleFunction | None = None,
        graders: Mapping[str, GradingPool] | None = None,
    ) -> None:
        """
        Args:
            decode: response ids, without the stop token, to the text that is graded.
            deadline: seconds for one step's generation and grading together.
            seed: sampling at step n is seeded by (seed, n): a resumed run samples what it would have sampled.
            tries: drop groups whose rewards are all equal and try further prompts, at most so many in a step
                (`prompts_per_step` or more); None keeps every group.
            fewest_groups: a batch has at least so many, uniform ones if need be (`policy.minibatches`).
            oversample: begin so many times the missing groups at once; above 1 the engine must be resumable.
            max_staleness: carried responses with older tokens than so many steps are generated anew.
            ahead: how many steps the engine's weights may be behind those that the step trains.
            frozen: nothing is trained, so that the engine's weights are never too old.
            endings: watches for steps in which no response ends by itself.
            function: makes the samples; None: the engine does, each in one piece.
            graders: for prompts whose `reward` is not `grading`'s.
        """
        self._engine = engine
        self._grading = grading
        self._prompts = list(prompts)
        self._cursor = cursor
        self._sampling = sampling
        self._prompts_per_step = prompts_per_step
        self._decode = decode
        self._deadline = deadline
        self._seed = seed
        self._timers = timers
        self._drops_uniform = tries is not None
        self._tries = math.ceil(prompts_per_step * oversample) if tries is None else tries
        self._fewest_groups = fewest_groups
        self._oversample = oversample
        self._max_staleness = max_staleness
        self._ahead = ahead
        self._frozen = frozen
        self._endings = endings
        self._function = function
        self._graders = graders or {}
        self._said: set[str] = set()
        self._given_up: StopEarly | None = None
        self._carried: list[OpenGroup] = []
        self._progress: Progress | None = None
        self.metrics: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """Cursor and carried groups as JSON values; before the step, while a step is not complete."""
        if self._progress is not None:
            return self._progress.before
        carried = [group.state() for group in self._carried]
        unscored = self._endings.in_a_row if self._endings is not None else 0
        return {
            "cursor": self._cursor.state_dict(),
            "pending_groups": carried,
            "unscored_steps": unscored,
            "sampling": self._sampling.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Responses that were begun with other settings of sampling are begun anew, and so is a batch that was collected
        ahead and that nobody takes over: their prompts have been handed out.
        """
        self._cursor.load_state_dict(state["cursor"])
        if self._endings is not None:
            self._endings.in_a_row = state.get("unscored_steps", 0)
        size = self._sampling.samples_per_prompt
        ready = [] if state.get("ahead") is None else state["ahead"]["groups"]
        begun = [{**EMPTY, "position": group["position"]} for group in ready]
        if self.same_sampling(state):
            begun += state["pending_groups"]
        else:
            begun += [{**EMPTY, "position": group["position"]} for group in state["pending_groups"]]
        self._carried = [restore(item, self._prompts, size) for item in begun]
        for group in self._carried:
            for sample, generation in group.generations.items():
                if generation.finish_reason != "abort":
                    self._submit(group, sample, generation)

    def same_sampling(self, state: Mapping[str, Any]) -> bool:
        """Whether responses of `state` were sampled as today; a state of an earlier version does not say otherwise."""
        return bool(state.get("sampling", now := self._sampling.state()) == now)

    def collect(self, step: int, stop: StopEarly | None = None) -> RolloutBatch:
        """Generate and grade the groups of step `step` (from 1).

        The cursor moves past every prompt that was tried, so a run that is resumed behind this step goes on
        with the next one, and one that is resumed before it tries the same prompts again. After WeightsNeeded or
        ServersLost a further call for the same step goes on where it was, within the same deadline.

        Args:
            stop: give the step up, soon, by StoppedEarly; `state` is then the one before it.

        Raises:
            RuntimeError: the engine holds other weights than those of step - 1 (or up to `ahead` steps older).
            TimeoutError: generation or grading passed the deadline.
            GradingPoolError: every response's grading failed, or so many that too few groups are left.
            FunctionFailed: the same of a function that made no samples, or that blocks all others.
            NothingEnds: see `Endings.note`.
        """
        oldest = 0 if self._frozen else max(0, step - 1 - self._ahead)
        if not oldest <= self._engine.version <= step - 1:
            raise RuntimeError(
                f"step {step}: the engine holds weight version {self._engine.version}, expected {step - 1}"
                f"{f' or {oldest}' if oldest < step - 1 else ''}; the last weight sync did not reach it"
            )
        self._given_up = stop
        self._check_given_up(step)
        if self._progress is None or self._progress.step != step:
            self._progress = Progress(step, self.state(), time.monotonic() + self._deadline)
            self._progress.open, self._carried = self._carried, []
            if not self._frozen:
                self._progress.drop_stale(self._max_staleness)
            self._progress.tokens_before = sampled_tokens(self._progress.open)
        progress = self._progress
        while len(progress.groups) < self._prompts_per_step and (
            progress.open or progress.tried < self._tries
        ):
            self._round(progress)
        groups = progress.groups
        missing = max(0, self._prompts_per_step - len(groups)) if self._drops_uniform else 0
        found = len(groups)
        failed = progress.failures()
        if self._endings is not None:
            self._endings.note(step, progress.complete())
        generated = sampled_tokens((*progress.complete(), *self._carried)) - progress.tokens_before
        stand_ins = self._stand_ins(step, found, progress.uniform) if missing else []
        self.metrics = {
            "prompts_tried": progress.tried,
            **progress.graded_metrics(stand_ins),
            **progress.source_metrics(stand_ins),
            "groups_missing": missing,
            "grading_failed": sum(failed[outcome] for outcome in FAILED_OUTCOMES),
        }
        if self._function is not None:
            counts = failure_counts(failed)
            self.metrics |= {f"function_failed_{kind}": count for kind, count in counts.items()}
        groups += stand_ins
        if len(groups) < self._fewest_groups:
            raise self._nothing_learned(failed)(
                f"step {step}: only {len(groups)} of {len(groups) + len(progress.lost)} groups have a response that "
                f"could be graded, and policy.minibatches needs {self._fewest_groups}; {self._why(failed)}"
            )
        groups += progress.lost
        if isinstance(self._engine, ResumableEngine):
            trained = self._engine.version if self._frozen else step - 1
            self.metrics["groups_carried"] = len(self._carried)
            self.metrics |= staleness_metrics(groups, trained_version=trained)
            self.metrics |= self._engine.take_metrics()
        self._progress = None
        metrics = self.metrics | {GENERATED: float(generated)}
        return RolloutBatch(step, self._engine.version, groups, metrics)

    def _round(self, progress: Progress) -> None:
        """Work on the open groups, and on as many new ones as are worth beginning, until enough are complete."""
        missing = self._prompts_per_step - len(progress.groups)
        begun = len(progress.open)
        fresh = min(max(0, math.ceil(missing * self._oversample) - begun), self._tries - progress.tried)
        size = self._sampling.samples_per_prompt
        if fresh > 0:
            for position, _ in self._cursor.take(fresh):
                progress.open.append(OpenGroup(position, self._prompts[position], size))
                progress.tried_by_source[self._prompts[position].source] += 1
            progress.tried += fresh
        self._generate(progress, missing)
        self._check_given_up(progress.step)
        progress.rounds += 1
        with self._timers("grade"):
            self._sort_out(progress)
        if progress.lost and not progress.groups and not progress.uniform:
            raise self._nothing_learned(progress.failures())(
                f"step {progress.step}: {NOT_ONE_GRADED}, so there is nothing to learn from; "
                f"{self._why(progress.failures())}"
            )

    def _generate(self, progress: Progress, missing: int) -> None:
        opened = progress.open
        stop = StopEarly() if self._oversample > 1.0 else None
        given_up = self._given_up
        if stop is not None and given_up is not None:
            given_up.on_set(stop.set)
        ending = given_up if stop is None else stop

        def check_enough(_: object) -> None:
            accepted = sum(
                group.graded() and not (self._drops_uniform and group.is_uniform()) for group in opened
            )
            overdue = any(group.overdue and not group.graded() for group in opened)
            if stop is not None and accepted >= missing and not overdue:
                stop.set()

        def on_finished(index: int, sample: int, generation: Generation) -> None:
            group = opened[index]
            group.generations[sample] = generation
            self._submit(group, sample, generation)
            if stop is not None:
                group.grades[sample].add_done_callback(check_enough)

        def on_failed(index: int, sample: int, kind: FailureKind) -> None:
            opened[index].failures[sample] = failed_outcome(kind)

        sampling = _with_seed(self._sampling, self._seed, progress.step, progress.rounds)
        ids = [group.prompt.token_ids for group in opened]
        left = max(0.1, progress.ends - time.monotonic())
        resume = {
            (index, sample): generation
            for index, group in enumerate(opened)
            for sample, generation in group.generations.items()
        }
        with self._timers("generate"), watched(self._engine):
            if self._function is not None:
                prompts = [group.prompt for group in opened]
                done = {(i, s) for i, group in enumerate(opened) for s in (*group.grades, *group.failures)}
                self._function.generate(
                    prompts,
                    sampling,
                    deadline=left,
                    on_finished=on_finished,
                    on_failed=on_failed,
                    skip=done,
                    stop=given_up,
                )
            elif isinstance(self._engine, ResumableEngine):
                if stop is not None:
                    for grade in (grade for group in opened for grade in group.grades.values()):
                        grade.add_done_callback(check_enough)  # at once where it is there already
                found = self._engine.generate_some(
                    ids, sampling, deadline=left, on_finished=on_finished, resume=resume, stop=ending
                )
                for group, generations in zip(opened, found):
                    kept = {s: g for s, g in enumerate(generations) if g is not None}
                    group.generations.update(kept)
            else:
                self._engine.generate(ids, sampling, deadline=left, on_finished=on_finished, stop=given_up)

    def _check_given_up(self, step: int) -> None:
        if self._given_up is not None and self._given_up.is_set:
            raise StoppedEarly(f"the rollout of step {step} was stopped")

    def _submit(self, group: OpenGroup, sample: int, generation: Generation) -> None:
        text = self._text(generation)
        group.texts[sample] = text
        grading = self._graders.get(group.prompt.reward, self._grading)
        prompt, tokens = group.prompt, len(generation.response_ids)
        facts = Facts(prompt.problem, prompt.columns, generation.finish_reason, tokens)
        group.grades[sample] = grading.submit(text, prompt.answer, facts)

    def _sort_out(self, progress: Progress) -> None:
        """Complete groups go to the batch or to the uniform ones; the rest, and what is too much, is carried."""
        carried = []
        for group in progress.open:
            if len(progress.groups) >= self._prompts_per_step or not group.finished():
                carried.append(group)
                continue
            done = self._close(group, progress)
            if not done.samples:
                progress.lost.append(done)
                continue
            uniform = len({sample.learned_reward for sample in done.samples}) == 1
            (progress.uniform if self._drops_uniform and uniform else progress.groups).append(done)
        progress.open = []
        if len(progress.groups) < self._prompts_per_step:
            progress.open = carried  # stopped before enough were accepted: go on with them
        else:
            self._carried = carried

    def _close(self, group: OpenGroup, progress: Progress) -> Group:
        try:
            return group.close(self._sampling.stop_token_ids, ends=progress.ends)
        except TimeoutError:
            raise TimeoutError(
                f"step {progress.step}: responses were not graded within rollout.deadline {self._deadline:g} s of the "
                "step's start; raise it, or reward.workers, or lower reward.deadline"
            ) from None

    def _why(self, failed: Counter[str]) -> str:
        """How many responses could not be graded, and why the last one."""
        counts = " and ".join(f"{count} {outcome}" for outcome, count in sorted(failed.items()))
        if self._nothing_learned(failed) is FunctionFailed and self._function is not None:
            trouble = self._function.last_trouble
            return f"{counts}; the last one: {trouble}. Correct rollout.function, or raise rollout.function_deadline"
        last = [pool.last_trouble for pool in (self._grading, *self._graders.values()) if pool.last_trouble]
        return f"{counts}; the last one: {'; '.join(last)}. Correct reward.function, or raise reward.deadline"

    def _nothing_learned(self, failed: Counter[str]) -> type[GradingPoolError] | type[FunctionFailed]:
        """Whose fault it is that there are too few samples: of the function's, where most failures are its."""
        if self._function is None:
            return GradingPoolError
        return (
            FunctionFailed if 2 * sum(failure_counts(failed).values()) >= failed.total() else GradingPoolError
        )

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

    def _text(self, generation: Generation) -> str:
        return self._decode(generation.text_ids)


def _with_seed(sampling: SamplingParams, seed: int, step: int, round_number: int) -> SamplingParams:
    # Fields of 31 bits (seed), 10 (round of the step) and 21 (step): no two rounds of a run collide.
    return replace(sampling, seed=(seed % 2**31) * 2**31 + round_number * 2**21 + step)
