"""A rollout batch as flat arrays: what goes from the rank that drives generation to all others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from megatron_laser.batching.packing import PackInput
from megatron_laser.types import RolloutBatch, Sample, TokenSets, as_int32


@dataclass(frozen=True)
class FlatBatch:
    """S samples in the order of `RolloutBatch.samples()`.

    tokens: [sum of lengths] int32, prompt then response of each sample.
    prompt_lengths, response_lengths, group_ids: [S] int32.
    rewards: [S] float32, NaN where ungraded. scored: [S] bool.
    rollout_logprobs: [sum of response lengths] float32, the engine's, nats.
    zc_logprobs: [S] float32, NaN where the engine did not score.
    routed_tokens: [S] int32, of how many of a sample's first tokens the engine gave the experts; 0: of none.
    routed_experts: [sum of routed_tokens, layers * experts_per_token] uint8 or int16.
    sampled: [sum of response lengths] bool, which response tokens the policy sampled; [0] where it sampled all.
    set_counts: [sum of response lengths] int32, of how many tokens each was sampled from; 0: of the whole vocabulary.
    [0] where no sample has a set. set_ids: [sum of set_counts] int32, these tokens.
    truncated: [S] bool, which responses were cut off; [0] where that is not known.
    policy_rewards: [S] float32, what the policy learns from; [0] where it learns from `rewards`.
    """

    step: int
    weight_version: int
    tokens: npt.NDArray[np.int32]
    prompt_lengths: npt.NDArray[np.int32]
    response_lengths: npt.NDArray[np.int32]
    group_ids: npt.NDArray[np.int32]
    rewards: npt.NDArray[np.float32]
    scored: npt.NDArray[np.bool_]
    rollout_logprobs: npt.NDArray[np.float32]
    zc_logprobs: npt.NDArray[np.float32]
    routed_tokens: npt.NDArray[np.int32]
    routed_experts: npt.NDArray[np.uint8 | np.int16]
    sampled: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    set_counts: npt.NDArray[np.int32] = field(default_factory=lambda: _NONE)
    set_ids: npt.NDArray[np.int32] = field(default_factory=lambda: _NONE)
    truncated: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    policy_rewards: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    #: The arrays of `to_arrays` and their dtypes: plain numbers that any process group can send.
    ARRAYS: ClassVar[dict[str, type[np.generic]]] = {
        "header": np.int64,
        "tokens": np.int32,
        "prompt_lengths": np.int32,
        "response_lengths": np.int32,
        "group_ids": np.int32,
        "rewards": np.float32,
        "scored": np.uint8,
        "rollout_logprobs": np.float32,
        "zc_logprobs": np.float32,
        "routed_tokens": np.int32,
        "routed_experts": np.uint8,  # or np.int16, of more than 256 experts
        "sampled": np.uint8,
        "set_counts": np.int32,
        "set_ids": np.int32,
        "truncated": np.uint8,
        "policy_rewards": np.float32,
    }

    def __post_init__(self) -> None:
        samples = len(self.prompt_lengths)
        responses = int(self.response_lengths.sum(dtype=np.int64))
        sizes = {
            "tokens": int(self.prompt_lengths.sum(dtype=np.int64)) + responses,
            "rollout_logprobs": responses,
            "sampled": responses if len(self.sampled) else 0,
            **dict.fromkeys(
                ("response_lengths", "group_ids", "rewards", "scored", "zc_logprobs", "routed_tokens"),
                samples,
            ),
            "set_counts": responses if len(self.set_counts) else 0,
            "set_ids": int(self.set_counts.sum(dtype=np.int64)),
            "truncated": samples if len(self.truncated) else 0,
            "policy_rewards": samples if len(self.policy_rewards) else 0,
        }
        for name, size in sizes.items():
            if getattr(self, name).shape != (size,):
                raise ValueError(
                    f"FlatBatch.{name} has shape {getattr(self, name).shape}: expected ({size},) from "
                    f"{samples} samples and their lengths."
                )
        outside = (self.routed_tokens < 0) | (self.routed_tokens > self.lengths)
        if outside.any():
            sample = int(np.argmax(outside))
            raise ValueError(
                f"FlatBatch.routed_tokens of sample {sample} is {int(self.routed_tokens[sample])}: expected 0 to its "
                f"{int(self.lengths[sample])} tokens."
            )
        if self.routed_experts.ndim != 2 or len(self.routed_experts) != self.routed_tokens.sum(
            dtype=np.int64
        ):
            raise ValueError(
                f"FlatBatch.routed_experts has shape {self.routed_experts.shape}: expected one row for each of the "
                f"{int(self.routed_tokens.sum(dtype=np.int64))} routed tokens."
            )

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.prompt_lengths)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[S] prompt plus response tokens."""
        return self.prompt_lengths.astype(np.int64) + self.response_lengths

    @cached_property
    def sampled_lengths(self) -> npt.NDArray[np.int32]:
        """[S] response tokens that the policy sampled: what losses and their counts are made of."""
        if not len(self.sampled):
            return self.response_lengths
        counts = np.concatenate(([0], np.cumsum(self.sampled, dtype=np.int64)))
        return np.diff(counts[self.response_offsets]).astype(np.int32)

    @cached_property
    def token_offsets(self) -> npt.NDArray[np.int64]:
        """[S + 1] where each sample starts in `tokens`."""
        return np.concatenate(([0], np.cumsum(self.lengths)))

    @cached_property
    def response_offsets(self) -> npt.NDArray[np.int64]:
        """[S + 1] where each response starts in `rollout_logprobs`.

        The rollout log-prob of a policy row is `rollout_logprobs[response_offsets[sample_index] +
        response_position]`.
        """
        return np.concatenate(([0], np.cumsum(self.response_lengths, dtype=np.int64)))

    @cached_property
    def set_offsets(self) -> npt.NDArray[np.int64]:
        """[sum of response lengths + 1], or [1], where each token's begins in `set_ids`."""
        return np.concatenate(([0], np.cumsum(self.set_counts, dtype=np.int64)))

    @cached_property
    def routed_offsets(self) -> npt.NDArray[np.int64]:
        """[S + 1] where each sample starts in `routed_experts`."""
        return np.concatenate(([0], np.cumsum(self.routed_tokens, dtype=np.int64)))

    def cut_off(self, max_new_tokens: int = 1) -> npt.NDArray[np.bool_]:
        """[S] which responses were cut off, of those with a token; where that is not known, those without a score that
        have `max_new_tokens`."""
        if len(self.truncated):
            return self.truncated & (self.response_lengths > 0)
        return ~self.scored & (self.response_lengths >= max_new_tokens)

    def prompt_ids(self, index: int) -> npt.NDArray[np.int32]:
        """The prompt of a sample: a view of `tokens`."""
        start = self.token_offsets[index]
        return self.tokens[start : start + self.prompt_lengths[index]]

    def response_ids(self, index: int) -> npt.NDArray[np.int32]:
        """The response of a sample, stop token included: a view of `tokens`."""
        end = self.token_offsets[index + 1]
        return self.tokens[end - self.response_lengths[index] : end]

    def pack_input(self, index: int) -> PackInput:
        """A sample as `pack` takes it."""
        return PackInput(
            index,
            self.prompt_ids(index),
            self.response_ids(index),
            bool(self.scored[index]),
            int(self.group_ids[index]),
            sampled=self.sampled[self.response_offsets[index] : self.response_offsets[index + 1]]
            if len(self.sampled)
            else None,
        )

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """One array per entry of `ARRAYS`, in that order, without those of sets and of rewards where there is none;
        `header` is (step, weight_version)."""
        header = (self.step, self.weight_version)
        left_out = {"routed_experts"} | (set() if len(self.set_counts) else {"set_counts", "set_ids"})
        left_out |= set() if len(self.policy_rewards) else {"policy_rewards"}
        return {
            name: np.ascontiguousarray(header if name == "header" else getattr(self, name), dtype=dtype)
            for name, dtype in self.ARRAYS.items()
            if name not in left_out
        } | {"routed_experts": np.ascontiguousarray(self.routed_experts)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> FlatBatch:
        """The inverse of `to_arrays`. Raises ValueError for missing, unknown or unfit arrays.

        Batches that were kept before models had experts lack the arrays of these, and have none; those of before there
        were environments lack `sampled`: the policy sampled all. Those without sets lack their two arrays, those
        that have one reward `policy_rewards`, and older ones `truncated`.
        """
        arrays = {name: np.zeros(0, cls.ARRAYS[name]) for name in _MAY_LACK} | dict(arrays)
        if not arrays.keys() & {"set_counts", "set_ids"}:
            arrays = {**arrays, "set_counts": _NONE, "set_ids": _NONE}
        if not arrays.keys() & {"routed_tokens", "routed_experts"}:
            samples = len(arrays.get("prompt_lengths", ()))
            arrays = {**arrays, "routed_tokens": np.zeros(samples, np.int32), "routed_experts": _UNROUTED}
        if arrays.keys() != cls.ARRAYS.keys():
            raise ValueError(f"arrays are {sorted(arrays)}: expected {sorted(cls.ARRAYS)}.")
        for name, dtype in cls.ARRAYS.items():
            if arrays[name].dtype != dtype and (name, arrays[name].dtype) != ("routed_experts", np.int16):
                raise ValueError(f"array {name!r} is {arrays[name].dtype}: expected {np.dtype(dtype)}.")
        fields = dict(arrays)
        step, weight_version = (int(value) for value in fields.pop("header"))
        fields["scored"] = fields["scored"].astype(np.bool_)
        fields["sampled"] = fields["sampled"].astype(np.bool_)
        fields["truncated"] = fields["truncated"].astype(np.bool_)
        return cls(step=step, weight_version=weight_version, **fields)


_MAY_LACK = ("sampled", "truncated", "policy_rewards")
_UNROUTED = np.zeros((0, 0), dtype=np.uint8)
_NONE: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)


def flatten(batch: RolloutBatch) -> FlatBatch:
    """The arrays of a rollout batch.

    Raises ValueError for a response whose log-probs do not match its tokens and OverflowError for an id that
    does not fit int32.
    """
    samples = list(batch.samples())
    for index, sample in enumerate(samples):
        ids, logprobs = sample.generation.response_ids, sample.generation.logprobs
        if len(ids) != len(logprobs):
            raise ValueError(
                f"sample {index} of step {batch.step} has {len(ids)} response ids and {len(logprobs)} "
                "log-probs: expected one log-prob for each id from the rollout engine."
            )
        if sample.generation.sampled is not None and len(sample.generation.sampled) != len(ids):
            raise ValueError(
                f"sample {index} of step {batch.step} has {len(ids)} response ids and a mask `sampled` of "
                f"{len(sample.generation.sampled)}: expected one entry for each id."
            )
    # Prompts stand in one batch many times, and each is one list.
    prompts = {id(s.prompt_ids): as_int32(s.prompt_ids) for s in samples}
    tokens = [part for s in samples for part in (prompts[id(s.prompt_ids)], s.generation.response_ids)]
    zc_logprobs = [math.nan if s.zc_logprob is None else s.zc_logprob for s in samples]
    routed = _routed(batch.step, samples)
    sets = _sets(batch.step, samples)
    return FlatBatch(
        step=batch.step,
        weight_version=batch.weight_version,
        tokens=np.concatenate(tokens or [np.zeros(0, np.int32)]),
        prompt_lengths=np.array([len(s.prompt_ids) for s in samples], dtype=np.int32),
        response_lengths=np.array([len(s.generation.response_ids) for s in samples], dtype=np.int32),
        group_ids=np.array(batch.group_ids(), dtype=np.int32),
        rewards=np.array([s.reward for s in samples], dtype=np.float32),
        scored=np.array([s.scored for s in samples], dtype=np.bool_),
        rollout_logprobs=np.concatenate(
            [s.generation.logprobs for s in samples] or [np.zeros(0, np.float32)]
        ),
        zc_logprobs=np.array(zc_logprobs, dtype=np.float32),
        routed_tokens=np.array([len(rows) for rows in routed], dtype=np.int32),
        routed_experts=np.concatenate([rows for rows in routed if len(rows)] or [_UNROUTED]),
        sampled=np.concatenate([s.generation.sampled_mask for s in samples])
        if any(s.generation.sampled is not None for s in samples)
        else np.zeros(0, np.bool_),
        set_counts=sets.counts,
        set_ids=sets.ids,
        truncated=np.array([s.generation.truncated for s in samples], dtype=np.bool_),
        policy_rewards=np.array(
            [s.learned_reward for s in samples] if any(s.policy_reward is not None for s in samples) else [],
            dtype=np.float32,
        ),
    )


def _routed(step: int, samples: Sequence[Sample]) -> list[npt.NDArray[np.uint8 | np.int16]]:
    """[tokens, layers * experts_per_token] of each sample."""
    found: list[npt.NDArray[np.uint8 | np.int16]] = []
    first: npt.NDArray[np.uint8 | np.int16] | None = None
    for index, sample in enumerate(samples):
        routed = sample.generation.routed_experts
        if routed is None or not len(routed):
            found.append(_UNROUTED)
            continue
        first = routed if first is None else first
        if len(routed) > sample.length or routed.shape[1:] != first.shape[1:] or routed.dtype != first.dtype:
            raise ValueError(
                f"sample {index} of step {step} has the experts of {len(routed)} tokens, and {sample.length} tokens; "
                f"they are {routed.dtype} of {routed.shape[1]} layers x {routed.shape[2]}, in samples before "
                f"{first.dtype} of {first.shape[1]} layers x {first.shape[2]}"
            )
        found.append(routed.reshape(len(routed), -1))
    return found


def _sets(step: int, samples: Sequence[Sample]) -> TokenSets:
    """Of all response tokens; of none where none has one."""
    if all(sample.generation.sets is None for sample in samples):
        return TokenSets.whole(0)
    parts = []
    for index, sample in enumerate(samples):
        ids, sets = sample.generation.response_ids, sample.generation.sets
        sets = TokenSets.whole(len(ids)) if sets is None else sets
        wrong = sets.first_without(ids) if len(sets) == len(ids) else 0
        if wrong is not None or len(sets.ids) != sets.counts.sum():
            raise ValueError(
                f"sample {index} of step {step} has {len(ids)} response ids and {len(sets)} sets of tokens that they "
                "were sampled from: expected one set for each id, with the id in it."
            )
        parts.append(sets)
    return TokenSets.join(parts)
