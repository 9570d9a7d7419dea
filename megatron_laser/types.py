"""The plain data that moves between data, rollout, rewards and trainer. No torch, no process groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort", "ended"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, already tokenized.

    `row` counts rows over all data files, from 0. `source`: the name of its source, "" where there is one only.
    `reward`: its verifier where that is not the run's. `columns`: its row as a JSON object, where a reward function may
    ask for it; else "".
    """

    row: int
    problem: str
    answer: str
    token_ids: list[int]
    epoch: int = 0
    source: str = ""
    reward: str = ""
    columns: str = ""


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """A model's routers: for each token, `layers` times `experts_per_token` of `num_experts`."""

    layers: int
    experts_per_token: int
    num_experts: int

    @property
    def dtype(self) -> type[np.uint8] | type[np.int16]:
        """The smallest type for an expert's number."""
        return np.uint8 if self.num_experts <= 256 else np.int16


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are sampled. `temperature` 0 means greedy.

    A token is sampled from the `top_k` most probable ones (None: from all), of which only the most probable stay that
    reach `top_p` of the whole distribution together, and those of at least `min_p` times the first one's probability.
    With `top_k` the engine also returns that set for each token, see `Generation`.

    With `score_token_id` the engine also returns log pi(score token | prompt, response) at temperature 1 for
    every response that ends in a stop token: one extra position behind it. With `routing` it also returns the experts
    that the routers of such a model chose.
    """

    samples_per_prompt: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    score_token_id: int | None = None
    routing: RoutingShape | None = None

    def state(self) -> dict[str, Any]:
        """What decides what a response is, but for the seed, as JSON values."""
        return {
            "samples_per_prompt": self.samples_per_prompt,
            "max_new_tokens": self.max_new_tokens,
            "stop_token_ids": list(self.stop_token_ids),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "score_token_id": self.score_token_id,
            "routing": self.routing is not None,
        }


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """`tokens` tokens in a row that one version of the weights sampled."""

    version: int
    tokens: int


def as_int32(ids: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Token ids as an array, itself where it is one already. Raises OverflowError for an id that does not fit: NumPy
    before 2.0 wraps such ids in silence."""
    if isinstance(ids, np.ndarray) and ids.dtype == np.int32:
        return ids
    wide = np.asarray(ids, dtype=np.int64)
    narrow = wide.astype(np.int32)
    if not np.array_equal(narrow, wide):
        raise OverflowError(f"token id {int(wide[narrow != wide][0])} does not fit int32")
    return narrow


@dataclass(frozen=True, slots=True, eq=False)
class TokenSets:
    """For each of some tokens the ids that it was sampled from, one token's after another's.

    counts: [tokens] int32, how many; 0: the whole vocabulary. ids: [sum of counts] int32.
    """

    counts: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.counts)

    def first_without(self, tokens: npt.NDArray[np.integer]) -> int | None:
        """The place of the first of the tokens that is not in its own set; None: all are."""
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        inside = self.counts == 0
        inside[owner[self.ids == tokens[owner]]] = True
        return None if inside.all() else int(np.argmin(inside))

    @classmethod
    def whole(cls, tokens: int) -> TokenSets:
        """Of so many tokens that were sampled from the whole vocabulary."""
        return cls(np.zeros(tokens, np.int32), np.zeros(0, np.int32))

    @classmethod
    def join(cls, parts: Sequence[TokenSets]) -> TokenSets:
        """Of the parts' tokens, one part after another."""
        empty = cls.whole(0)
        return cls(
            np.concatenate([empty.counts, *(part.counts for part in parts)]),
            np.concatenate([empty.ids, *(part.ids for part in parts)]),
        )


@dataclass(slots=True, eq=False)
class Generation:
    """What an engine returns for one response.

    `response_ids` [tokens] int32 includes the stop token when `finish_reason` is "stop". `logprobs` [tokens] float32,
    nats, has one entry for each response id: the log-probability of logits / temperature, before top-p filtering, but
    where `sets` says which tokens it was sampled from: there it is that of the softmax over these. Both may be given as
    any sequence of numbers. `weight_version` is the oldest that sampled a part of it, and `spans` says which sampled
    what; empty: all is `weight_version`'s. With `finish_reason` "abort" it is unfinished: an engine can go on with it.
    "ended": somebody ended it on purpose, for its prefix's score (evaluations alone); it stays as it is.

    `routed_experts` [tokens, layers, experts_per_token] uint8, int16 with more than 256 experts: where a model with
    experts sent the first tokens of prompt and response, of which there may be fewer than of both; None: not told.

    `sampled` [tokens] bool: which tokens the policy sampled; the others an environment wrote (`rollout.function`), and
    nothing is learned from them. Their log-probs mean nothing, and `spans` does not count them. None: all.
    `sets`: of each response id the tokens that it was sampled from; None: all from the whole vocabulary.
    `cut_off`: whether it ends in the middle of what the policy was saying; None: as `finish_reason` says. They differ
    for a sample of `rollout.function` that an environment, or the function itself, has ended: a "length" without a cut.
    `prefix_reads`: what was read of the policy at each place at which it might have been ended; None: nobody looked.
    """

    response_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    finish_reason: FinishReason
    weight_version: int
    zc_logprob: float | None = None
    spans: tuple[WeightSpan, ...] = ()
    routed_experts: npt.NDArray[np.uint8 | np.int16] | None = None
    sampled: npt.NDArray[np.bool_] | None = None
    sets: TokenSets | None = None
    cut_off: bool | None = None
    prefix_reads: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raises OverflowError for an id that does not fit int32."""
        self.response_ids = as_int32(self.response_ids)
        self.logprobs = np.asarray(self.logprobs, dtype=np.float32)

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, whatever experts made it; a log-prob that is NaN equals none."""
        if not isinstance(other, Generation):
            return NotImplemented
        return (
            (self.finish_reason, self.weight_version, self.zc_logprob, self.spans)
            == (other.finish_reason, other.weight_version, other.zc_logprob, other.spans)
            and self.truncated == other.truncated
            and np.array_equal(self.response_ids, other.response_ids)
            and np.array_equal(self.logprobs, other.logprobs)
            and np.array_equal(self.sampled_mask, other.sampled_mask)
        )

    @property
    def sampled_mask(self) -> npt.NDArray[np.bool_]:
        """[tokens] bool, `sampled` with None written out."""
        return np.ones(len(self.response_ids), np.bool_) if self.sampled is None else self.sampled

    @property
    def truncated(self) -> bool:
        """Whether it was cut off, by a limit of the run's or of a function's."""
        return self.finish_reason == "length" if self.cut_off is None else self.cut_off

    @property
    def policy_logprobs(self) -> npt.NDArray[np.float32]:
        """`logprobs` of the tokens that the policy sampled."""
        return self.logprobs if self.sampled is None else self.logprobs[self.sampled]

    @property
    def text_ids(self) -> list[int]:
        """What is decoded and graded: the response without the stop token that ended it, as tokenizers take it."""
        found: list[int] = self.response_ids[: -1 if self.finish_reason == "stop" else None].tolist()
        return found

    def is_scored(self, stop_token_ids: tuple[int, ...]) -> bool:
        """Whether this response has a self-reward score: it stopped by itself, on a stop token."""
        return (
            self.finish_reason == "stop"
            and len(self.response_ids) > 0
            and int(self.response_ids[-1]) in stop_token_ids
        )


OF_TERMS = ("policy_reward", "terms", "vote_answer")
"""What a sample has only where a reward has terms or a threshold, or its function returned more than a number."""


@dataclass(slots=True)
class Sample:
    """One graded response of a group."""

    prompt_ids: list[int]
    generation: Generation
    text: str
    scored: bool
    reward: float = math.nan  # the verifier's label r_v, 1.0 right or 0.0 wrong; nan until graded
    outcome: str = (
        ""  # correct, wrong, no_answer, unparsable, timeout, crash, or why there is none (see `Group`)
    )
    zc_logprob: float | None = None  # log pi(z_c | x, y, EOS) when the engine scored it
    policy_reward: float | None = None  # what the policy learns from, where that is not `reward`
    terms: dict[str, float | None] | None = None  # what rewards are made of, where there are several
    vote_answer: str | None = None  # its answer for votes, where the reward function gave one

    @property
    def learned_reward(self) -> float:
        """The reward that the policy learns from."""
        return self.reward if self.policy_reward is None else self.policy_reward

    @property
    def length(self) -> int:
        """Prompt plus response tokens."""
        return len(self.prompt_ids) + len(self.generation.response_ids)


@dataclass(slots=True)
class Group:
    """All responses sampled for one prompt.

    samples: what a step trains on, graded. ungraded: the responses whose grading failed (outcome timeout or crash):
    they have no label, and neither policy nor score learns from them; and, empty, those that `rollout.function` did not
    make (function_timeout, function_error, function_invalid).
    """

    prompt: Prompt
    samples: list[Sample]
    ungraded: list[Sample] = field(default_factory=list)


@dataclass(slots=True)
class RolloutBatch:
    """What one step trains on: finished groups, graded, in prompt order.

    metrics: what was counted while it was collected, see `RolloutCollector`.
    """

    step: int
    weight_version: int
    groups: list[Group] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def samples(self) -> Iterator[Sample]:
        """All graded samples, group after group; the position is the sample's index everywhere downstream."""
        for group in self.groups:
            yield from group.samples

    def group_ids(self) -> list[int]:
        """The group index of each sample, in the order of `samples()`."""
        return [index for index, group in enumerate(self.groups) for _ in group.samples]
