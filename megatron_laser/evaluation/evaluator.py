"""Evaluation of whatever an engine holds: sample, grade, score, write down, summarize."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_laser.evaluation.prefix_rule import PrefixRule
from megatron_laser.evaluation.prefix_scores import PrefixScores, score_prefixes
from megatron_laser.evaluation.records import (
    EvaluationRecord,
    complete_records,
    open_records,
    write_records,
)
from megatron_laser.evaluation.responses import EvaluationEngine, ResponseFile, Sampler, SavedResponse
from megatron_laser.evaluation.score_rule import ScoreRule
from megatron_laser.evaluation.summary import summarize_sources
from megatron_laser.files import plain, write_atomically
from megatron_laser.rewards import Facts, Grade, GradingPool, equivalence_classes
from megatron_laser.rollout.engine import StopEarly, StoppedEarly
from megatron_laser.types import Prompt, SamplingParams


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """The metrics (names: see `summarize_sources`) and where records and summary lie."""

    metrics: dict[str, float]
    records_path: Path
    summary_path: Path

    def prefixed(self, prefix: str = "eval/") -> dict[str, float]:
        """The metrics as metrics.jsonl names them."""
        return {prefix + name: value for name, value in self.metrics.items()}


def evaluate(
    engine: EvaluationEngine,
    prompts: Sequence[Prompt],
    *,
    sampling: SamplingParams,
    decode: Callable[[list[int]], str],
    grading: GradingPool,
    rule: ScoreRule,
    records_path: Path,
    deadline: float,
    generation_batch: int,
    responses_path: Path | None = None,
    repeatable: bool = True,
    on_response: Callable[[int, bool], None] | None = None,
    stop: StopEarly | None = None,
    force_end_below: int = 0,
    graders: Mapping[str, GradingPool] | None = None,
    prefixes: PrefixRule | None = None,
    own_sampling: Mapping[str, SamplingParams] | None = None,
) -> EvaluationSummary:
    """Answer every prompt `sampling.samples_per_prompt` times and judge the answers and their scores.

    Records are appended to `records_path` as batches finish; the summary is written beside it with the suffix
    .json when all have, so a summary always belongs to complete records.

    Args:
        decode: response ids without the stop token to text.
        rule: how the score is read.
        deadline: seconds for all of it.
        generation_batch: responses asked for in one call of the engine; at least one prompt's.
        responses_path: write every response here as it arrives, and go on from what this file and
            `records_path` hold already. None: start anew.
        repeatable: the engine gives equal responses to equal calls. What is missing of a batch is then sampled
            by the batch's own call once more, so that an interrupted evaluation has the numbers of an
            undisturbed one; otherwise only missing responses are asked for.
        on_response: called with each response's number of tokens, and whether it is new; first with those that were
            there already.
        stop: set, it ends the evaluation within seconds; what has been sampled by then is in `responses_path`.
        force_end_below: responses with a box that did not end by themselves are scored behind a forced end token, for
            `released_convention`, where prompt, response and that token are fewer tokens than this. 0: none.
        graders: for prompts whose `reward` is not `grading`'s.
        prefixes: how the prefixes of responses are scored; None: they are not.
        own_sampling: by a source's name, in place of `sampling`; what ends a response is the same.

    Raises:
        StoppedEarly: `stop` was set.
        ValueError: no prompts, `generation_batch` below 1, or a broken line in a file to go on from.
        TimeoutError: the deadline passed; says how far the evaluation came.
        RuntimeError: the engine returned another number of responses or a log-prob that is not finite.
    """
    if not prompts:
        raise ValueError("evaluation got no prompts; check the data file and evaluation.max_prompts")
    if generation_batch < 1:
        raise ValueError(f"generation_batch is {generation_batch}; expected 1 or more responses")
    calls = list(_calls(prompts, sampling, own_sampling or {}, generation_batch))
    samples = {prompt.row: own.samples_per_prompt for _, batch, own in calls for prompt in batch}
    summary_path = records_path.with_suffix(".json")
    summary_path.unlink(missing_ok=True)
    known = complete_records(records_path, samples) if responses_path is not None else {}
    records: list[EvaluationRecord] = []
    count = on_response or (lambda tokens, new: None)
    with (
        open_records(records_path, known) as file,
        ResponseFile(responses_path, skip_rows=known.keys()) as responses,
    ):
        ends = time.monotonic() + deadline
        returned = rule.token_ids[0] if rule.is_plain else None
        job = _Job(
            engine,
            sampling,
            decode,
            grading,
            graders or {},
            rule,
            ends,
            force_end_below,
            prefixes,
        )
        for prompt in prompts:
            for record in known.get(prompt.row, []):
                count(record.response_ids_length, False)
        for length in responses.lengths():
            count(length, False)
        for start, batch, own in calls:
            sampler = Sampler(engine, own, returned, responses, repeatable, count, ends, stop)
            finished = [record for prompt in batch for record in known.get(prompt.row, [])]
            open_prompts = [prompt for prompt in batch if prompt.row not in known]
            try:
                groups = sampler.run(batch, open_prompts, start)
                if stop is not None and stop.is_set:
                    raise StoppedEarly(f"{start} of {len(prompts)} prompts were done")
                new = job.judge(open_prompts, groups)
            except TimeoutError as error:
                raise TimeoutError(
                    f"evaluation into {records_path}: {start} of {len(prompts)} prompts were done when its "
                    f"{deadline:g} s ended; raise the deadline, or lower evaluation.max_prompts or "
                    f"the samples per prompt ({error})"
                ) from error
            write_records(file, new)
            # Texts are on disk; 32 long responses to each of many problems need not stay in memory.
            records += [replace(record, response="") for record in [*finished, *new]]
    metrics = summarize_sources(records, seed=sampling.seed or 0)
    write_atomically(
        summary_path, json.dumps({name: plain(value) for name, value in metrics.items()}, indent=1) + "\n"
    )
    return EvaluationSummary(metrics, records_path, summary_path)


def _calls(
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    own: Mapping[str, SamplingParams],
    generation_batch: int,
) -> Iterator[tuple[int, Sequence[Prompt], SamplingParams]]:
    """(place of the first prompt, prompts, sampling) of each call of the engine: of prompts that are sampled alike."""
    start = 0
    while start < len(prompts):
        mine = own.get(prompts[start].source, sampling)
        end, per_call = start, max(1, generation_batch // mine.samples_per_prompt)
        while end < min(len(prompts), start + per_call) and own.get(prompts[end].source, sampling) == mine:
            end += 1
        yield start, prompts[start:end], mine
        start = end


@dataclass(frozen=True, slots=True)
class _Job:
    """Grading and scoring: what stays the same from batch to batch."""

    engine: EvaluationEngine
    sampling: SamplingParams
    decode: Callable[[list[int]], str]
    grading: GradingPool
    graders: Mapping[str, GradingPool]
    rule: ScoreRule
    ends: float
    force_end_below: int
    prefixes: PrefixRule | None = None

    def judge(self, prompts: Sequence[Prompt], groups: list[list[SavedResponse]]) -> list[EvaluationRecord]:
        """The records of all responses, prompt after prompt."""
        texts = [[self.decode(response.text_ids) for response in group] for group in groups]
        graded = iter(given := self._grades(prompts, groups, texts))
        answers = [
            [self._answer(prompt, text, next(graded)) for text in group_texts]
            for prompt, group_texts in zip(prompts, texts)
        ]
        zc_logprobs = self._score(prompts, groups)
        forced = self._score_behind_forced_end(prompts, groups, answers)
        scored_prefixes = None
        if self.prefixes is not None:
            left = self._left("score prefixes")
            scored_prefixes = score_prefixes(self.engine, self.prefixes, prompts, groups, deadline=left)
        grades = iter(given)
        records: list[EvaluationRecord] = []
        for place_of_prompt, (prompt, group) in enumerate(zip(prompts, groups)):
            extracted, form = answers[place_of_prompt], self._pool(prompt).form
            left = self._left("compare answers")
            classes = equivalence_classes(extracted, left, pool=self.grading, form=form)
            for place, response in enumerate(group):
                records.append(
                    self._record(
                        prompt,
                        response,
                        text=texts[place_of_prompt][place],
                        grade=next(grades),
                        extracted=extracted[place],
                        answer_class=classes[place],
                        zc_logprob=zc_logprobs[place_of_prompt][place],
                        forced_zc_logprob=forced.get((place_of_prompt, place)),
                        prefix=None if scored_prefixes is None else scored_prefixes[place_of_prompt][place],
                    )
                )
        return records

    def _answer(self, prompt: Prompt, text: str, grade: Grade | None) -> str | None:
        """What a response votes for: what its reward function says, else what its verifier's form reads."""
        if grade is None:
            return None
        return self._pool(prompt).form.extract(text, prompt.answer) if grade.answer is None else grade.answer

    def _pool(self, prompt: Prompt) -> GradingPool:
        return self.graders.get(prompt.reward, self.grading)

    def _grades(
        self, prompts: Sequence[Prompt], groups: list[list[SavedResponse]], texts: list[list[str]]
    ) -> list[Grade | None]:
        """Of all responses, prompt after prompt, each from its prompt's verifier; None: it was ended, and gives no
        answer whatever its beginning would be graded."""
        asked: dict[int, tuple[GradingPool, list[int], list[tuple[str, str]], list[Facts]]] = {}
        place = 0
        for prompt, group, group_texts in zip(prompts, groups, texts):
            pool = self._pool(prompt)
            _, places, pairs, facts = asked.setdefault(id(pool), (pool, [], [], []))
            for response, text in zip(group, group_texts, strict=True):
                if not response.was_ended:
                    places.append(place)
                    pairs.append((text, prompt.answer))
                    tokens = len(response.response_ids)
                    facts.append(Facts(prompt.problem, prompt.columns, response.finish_reason, tokens))
                place += 1
        grades: dict[int, Grade] = {}
        for pool, places, pairs, facts in asked.values():
            found = pool.grade_many(pairs, deadline=self._left("grade"), facts=facts)
            grades.update(zip(places, found, strict=True))
        return [grades.get(index) for index in range(place)]

    def _score(
        self, prompts: Sequence[Prompt], groups: list[list[SavedResponse]]
    ) -> list[list[float | None]]:
        """zc_logprob of scored responses; the engine is asked for what it did not return with them."""
        values: list[list[float | None]] = [[None] * len(group) for group in groups]
        if not self.rule.token_ids:
            return values
        open_places: list[tuple[int, int]] = []
        for i, group in enumerate(groups):
            for j, response in enumerate(group):
                if not response.is_scored(self.sampling.stop_token_ids):
                    continue
                values[i][j] = response.zc_logprob if self.rule.is_plain else None
                if values[i][j] is None:
                    open_places.append((i, j))
        if open_places:
            sequences = [prompts[i].token_ids + groups[i][j].response_ids for i, j in open_places]
            answers = self.rule.read(self.engine, sequences, deadline=self._left("score"))
            for (i, j), answer in zip(open_places, answers, strict=True):
                values[i][j] = answer
        for prompt, row in zip(prompts, values):
            for value in row:
                if value is not None:
                    self._check_finite(value, prompt)
        return values

    def _score_behind_forced_end(
        self,
        prompts: Sequence[Prompt],
        groups: list[list[SavedResponse]],
        answers: list[list[str | None]],
    ) -> dict[tuple[int, int], float]:
        """(prompt, response) -> zc_logprob of those that have a box and no end, see `force_end_below`."""
        if not self.rule.makes_scores or not self.force_end_below:
            return {}
        stops = self.sampling.stop_token_ids
        found = {
            (i, j): [*prompts[i].token_ids, *response.response_ids, stops[0]]
            for i, group in enumerate(groups)
            for j, response in enumerate(group)
            if answers[i][j] is not None and not response.is_scored(stops)
        }
        found = {place: ids for place, ids in found.items() if len(ids) < self.force_end_below}
        if not found:
            return {}
        left = self._left("score behind a forced end")
        values = self.rule.read(self.engine, list(found.values()), deadline=left)
        for (i, _), value in zip(found, values, strict=True):
            self._check_finite(value, prompts[i])
        return dict(zip(found, values))

    def _check_finite(self, value: float, prompt: Prompt) -> None:
        if not math.isfinite(value):
            raise RuntimeError(
                f"the engine returned log-prob {value} of score token {self.rule.token_ids[0]} for a "
                f"response to row {prompt.row}; expected a finite number: check the weights"
            )

    def _record(
        self,
        prompt: Prompt,
        response: SavedResponse,
        *,
        text: str,
        grade: Grade | None,
        extracted: str | None,
        answer_class: int | None,
        zc_logprob: float | None,
        forced_zc_logprob: float | None,
        prefix: PrefixScores | None,
    ) -> EvaluationRecord:
        return EvaluationRecord(
            row=prompt.row,
            sample=response.sample,
            problem=prompt.problem,
            answer=prompt.answer,
            response=text,
            response_ids_length=len(response.response_ids),
            finish_reason=response.finish_reason,
            scored=response.is_scored(self.sampling.stop_token_ids),
            reward=0.0 if grade is None else grade.reward,
            outcome="ended" if grade is None else grade.outcome,
            extracted=extracted,
            zc_logprob=zc_logprob,
            score=self.rule.score(zc_logprob),
            mean_logprob=response.mean_logprob,
            answer_class=answer_class,
            forced_zc_logprob=forced_zc_logprob,
            forced_score=self.rule.score(forced_zc_logprob),
            source=prompt.source,
            prefix_tokens=None if prefix is None else prefix.tokens,
            prefix_scores=None if prefix is None else prefix.scores,
        )

    def _left(self, phase: str) -> float:
        left = self.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no time was left to {phase}")
        return left
