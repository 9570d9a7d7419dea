"""Groups that are not finished yet: what is known of each response, and how a checkpoint keeps it."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laser.rewards import Grade
from megatron_laser.types import (
    OF_TERMS,
    Generation,
    Group,
    Prompt,
    RolloutBatch,
    Sample,
    TokenSets,
    WeightSpan,
)


@dataclass(eq=False)
class OpenGroup:
    """One prompt on its way to `size` graded responses.

    generations: sample -> finished or (`abort`) unfinished response. texts, grades: of the finished ones.
    failures: sample -> outcome, where `rollout.function` made none.
    overdue: a response has been given up for its age: this time the step waits for it, or the longest ones would be
    begun again and again and never be trained on.
    """

    position: int  # of the prompt among all prompts
    prompt: Prompt
    size: int
    generations: dict[int, Generation] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    grades: dict[int, Future[Grade]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    overdue: bool = False

    def finished(self) -> bool:
        """Whether every response has ended; grades may still be on their way."""
        return len(self.grades) + len(self.failures) == self.size

    def graded(self) -> bool:
        """Whether every response is graded too."""
        return self.finished() and all(grade.done() for grade in self.grades.values())

    def is_uniform(self) -> bool:
        """Whether all grades give one reward, or there is none; of a graded group."""
        grades = [grade.result() for grade in self.grades.values()]
        return len({grade.learned for grade in grades if not grade.failed}) <= 1

    def drop_older_than(self, version: int) -> int:
        """Forget what has tokens of older weights; returns how many responses that are."""
        old = [s for s, generation in self.generations.items() if generation.weight_version < version]
        for sample in old:
            del self.generations[sample]
            self.texts.pop(sample, None)
            self.grades.pop(sample, None)
        self.overdue = self.overdue or bool(old)
        return len(old)

    def close(self, stop_token_ids: tuple[int, ...], *, ends: float) -> Group:
        """The group with its grades, of which the last are waited for until `ends` (by time.monotonic()).

        Raises TimeoutError when they do not come.
        """
        samples: list[Sample] = []
        ungraded: list[Sample] = []
        for number in range(self.size):
            if number in self.failures:
                nothing = Generation([], [], "length", weight_version=0)  # type: ignore[arg-type]
                outcome = self.failures[number]
                ungraded.append(Sample(self.prompt.token_ids, nothing, "", scored=False, outcome=outcome))
                continue
            generation = self.generations[number]
            grade = self.grades[number].result(timeout=max(0.1, ends - time.monotonic()))
            (ungraded if grade.failed else samples).append(
                Sample(
                    prompt_ids=self.prompt.token_ids,
                    generation=generation,
                    text=self.texts[number],
                    scored=generation.is_scored(stop_token_ids),
                    reward=grade.reward,
                    outcome=grade.outcome,
                    zc_logprob=generation.zc_logprob,
                    policy_reward=grade.policy_reward,
                    terms=None if grade.terms is None else dict(grade.terms),
                    vote_answer=grade.answer,
                )
            )
        return Group(self.prompt, samples, ungraded)

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` makes the group again; grades are not kept but made anew."""
        return {
            "position": self.position,
            "overdue": self.overdue,
            "generations": {str(s): generation_state(g) for s, g in self.generations.items()},
        }


EMPTY: dict[str, Any] = {"generations": {}, "overdue": False}
"""What `OpenGroup.state` says, beside the position, of a group that has no response yet."""


def restore(state: Mapping[str, Any], prompts: list[Prompt], size: int) -> OpenGroup:
    """The group of `OpenGroup.state`, without grades."""
    position = int(state["position"])
    generations = {int(s): generation_from(g) for s, g in state["generations"].items()}
    return OpenGroup(position, prompts[position], size, generations, overdue=state["overdue"])


def generation_state(generation: Generation) -> dict[str, Any]:
    """A response as JSON values."""
    routed, sets = generation.routed_experts, generation.sets
    return {
        "response_ids": array_state(generation.response_ids),
        "logprobs": array_state(generation.logprobs),
        "finish_reason": generation.finish_reason,
        "weight_version": generation.weight_version,
        "zc_logprob": generation.zc_logprob,
        "spans": [[span.version, span.tokens] for span in generation.spans],
        "routed_experts": None if routed is None else array_state(routed),
        "sampled": None if generation.sampled is None else array_state(generation.sampled),
        "sets": None if sets is None else [array_state(sets.counts), array_state(sets.ids)],
        "cut_off": generation.cut_off,
    }


def generation_from(state: Mapping[str, Any]) -> Generation:
    """The inverse of `generation_state`."""
    values = dict(state)
    spans = tuple(WeightSpan(version, tokens) for version, tokens in values.pop("spans"))
    # Older checkpoints have none of these.
    routed, sampled, sets = (values.pop(name, None) for name in ("routed_experts", "sampled", "sets"))
    # Older ones have lists of numbers, which become the same arrays.
    ids, logprobs = (
        array_from(saved) if isinstance(saved := values.pop(name), dict) else saved
        for name in ("response_ids", "logprobs")
    )
    return Generation(
        ids,
        logprobs,
        **values,
        spans=spans,
        routed_experts=None if routed is None else array_from(routed),
        sampled=None if sampled is None else array_from(sampled),
        sets=None if sets is None else TokenSets(*map(array_from, sets)),
    )


def array_state(array: npt.NDArray[Any]) -> dict[str, Any]:
    """JSON values from which `array_from` makes the array again, bit by bit."""
    data = base64.b64encode(array.tobytes()).decode()
    return {"shape": list(array.shape), "dtype": array.dtype.name, "data": data}


def array_from(state: Mapping[str, Any]) -> npt.NDArray[Any]:
    """The inverse of `array_state`."""
    flat = np.frombuffer(base64.b64decode(state["data"]), dtype=state["dtype"]).copy()  # else it is read-only
    return flat.reshape(state["shape"])


def batch_state(batch: RolloutBatch, positions: Mapping[int, int]) -> dict[str, Any]:
    """A finished batch as JSON values; `positions`: prompt row -> position among all prompts."""
    return {
        "step": batch.step,
        "weight_version": batch.weight_version,
        "metrics": batch.metrics,
        "groups": [
            {
                "position": positions[group.prompt.row],
                "samples": [sample_state(sample) for sample in group.samples],
                "ungraded": [sample_state(sample) for sample in group.ungraded],
            }
            for group in batch.groups
        ],
    }


def batch_from(state: Mapping[str, Any], prompts: list[Prompt]) -> RolloutBatch:
    """The inverse of `batch_state`."""
    groups = []
    for item in state["groups"]:
        prompt = prompts[item["position"]]
        samples = [sample_from(saved, prompt) for saved in item["samples"]]
        ungraded = [sample_from(saved, prompt) for saved in item.get("ungraded", [])]
        groups.append(Group(prompt, samples, ungraded))
    return RolloutBatch(state["step"], state["weight_version"], groups, state["metrics"])


def sample_state(sample: Sample) -> dict[str, Any]:
    """A graded response as JSON values, without its prompt."""
    return {
        "generation": generation_state(sample.generation),
        "text": sample.text,
        "scored": sample.scored,
        "reward": sample.reward,
        "outcome": sample.outcome,
        "zc_logprob": sample.zc_logprob,
        **{name: value for name in OF_TERMS if (value := getattr(sample, name)) is not None},
    }


def sample_from(state: Mapping[str, Any], prompt: Prompt) -> Sample:
    """The inverse of `sample_state`."""
    values = dict(state)
    return Sample(prompt_ids=prompt.token_ids, generation=generation_from(values.pop("generation")), **values)
