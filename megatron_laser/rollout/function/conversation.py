"""One sample as a user's function puts it together: what the policy sampled, and what the environment wrote."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_laser.types import FinishReason, Generation, Prompt, SamplingParams, WeightSpan


class InvalidSample(ValueError):
    """What a `rollout.function` made, or asked for, is no sample that can be trained on; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What one `engine.generate` returned.

    Attributes:
        input_ids: what it was sampled behind.
        ids: the sampled tokens, the one that ended the turn included.
        logprobs: [tokens] float32, nats, one for each of `ids`: of logits / temperature.
        finish_reason: "stop", ended by a stop token, or "length".
        weight_version: of the weights that sampled it.
    """

    input_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: npt.NDArray[np.float32]
    finish_reason: FinishReason
    weight_version: int


@dataclass(slots=True)
class FunctionSample:
    """What a function returns for one prompt, if not a `Conversation`.

    Attributes:
        ids: the response: everything behind the prompt.
        sampled: one entry for each id, whether the policy sampled it. Only those are learned from.
        logprobs: one entry for each id; what stands beside an id that the policy did not sample is not read.
        weight_versions: (version, sampled tokens) of consecutive sampled tokens; empty: the engine's version.
        cut_off: whether it ends in the middle of a turn, which a limit has cut off. One that fills
            `sampling.max_new_tokens` without a stop token counts as cut off in any case.
    """

    ids: Sequence[int]
    sampled: Sequence[bool]
    logprobs: Sequence[float]
    weight_versions: Sequence[tuple[int, int]] = ()
    cut_off: bool = False


@dataclass(slots=True)
class Conversation:
    """Collects one sample turn by turn, and keeps tokens, mask and log-probs in step.

        talk = Conversation(prompt, sampling)
        talk.sampled(await engine.generate(talk.ids))
        talk.environment(engine.encode(" 17"))

    Attributes:
        response_ids: everything behind the prompt so far.
    """

    prompt: Prompt
    sampling: SamplingParams
    response_ids: list[int] = field(default_factory=list, init=False)
    _sampled: list[bool] = field(default_factory=list, init=False)
    _logprobs: list[float] = field(default_factory=list, init=False)
    _versions: list[tuple[int, int]] = field(default_factory=list, init=False)
    _cut_off: bool = field(default=False, init=False)

    @property
    def ids(self) -> list[int]:
        """Prompt and response so far: what the next turn is sampled behind."""
        return [*self.prompt.token_ids, *self.response_ids]

    @property
    def tokens_left(self) -> int:
        """How many tokens the response may still get, sampled and written ones together."""
        return self.sampling.max_new_tokens - len(self.response_ids)

    def sampled(self, turn: Turn, keep: int | None = None) -> None:
        """Append what the policy sampled behind `ids`, or its first `keep` tokens.

        Raises InvalidSample for a turn that was sampled behind something else, or does not fit.
        """
        if list(turn.input_ids) != self.ids:
            raise InvalidSample(
                f"a turn that was sampled behind {len(turn.input_ids)} other tokens cannot be appended to these "
                f"{len(self.ids)}: its log-probs are of another text. Call engine.generate(conversation.ids)"
            )
        count = len(turn.ids) if keep is None else keep
        if not 0 <= count <= len(turn.ids):
            raise InvalidSample(f"keep={keep}: the turn has {len(turn.ids)} tokens")
        self._append(turn.ids[:count], True, turn.logprobs[:count].tolist())
        if count:
            self._versions.append((turn.weight_version, count))
            # Of a turn that is kept in part the function decides where it ends.
            self._cut_off = turn.finish_reason == "length" and count == len(turn.ids)

    def environment(self, ids: Sequence[int]) -> None:
        """Append tokens that the environment wrote: the policy reads them, and learns nothing from them.

        Raises InvalidSample where they do not fit; see `tokens_left`.
        """
        self._append(ids, False, [0.0] * len(ids))
        self._cut_off = self._cut_off and not len(ids)

    def sample(self) -> FunctionSample:
        """What has come together. A function may as well return the conversation itself."""
        return FunctionSample(self.response_ids, self._sampled, self._logprobs, self._versions, self._cut_off)

    def _append(self, ids: Sequence[int], sampled: bool, logprobs: list[float]) -> None:
        if len(ids) > self.tokens_left:
            raise InvalidSample(
                f"{len(ids)} more tokens make the response {len(self.response_ids) + len(ids)} long; expected at most "
                f"rollout.max_new_tokens {self.sampling.max_new_tokens}: look at conversation.tokens_left before"
            )
        self.response_ids.extend(ids)
        self._sampled.extend([sampled] * len(ids))
        self._logprobs.extend(logprobs)


def check_ids(ids: Sequence[int], vocab_size: int, what: str) -> list[int]:
    """Token ids as a list of Python's integers.

    Raises InvalidSample for anything but whole numbers from 0 to `vocab_size` - 1: a server ends on such an id.
    """
    array = np.asarray(ids) if len(ids) else np.zeros(0, np.int64)
    if (
        array.ndim == 1
        and array.dtype.kind in "iu"
        and (not len(ids) or 0 <= array.min() <= array.max() < vocab_size)
    ):
        found: list[int] = array.tolist()
        return found
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise InvalidSample(f"{what}: entry {place} is {token!r:.60}, expected a token id")
        if not 0 <= token < vocab_size:
            raise InvalidSample(
                f"{what}: token id {token} at {place}; expected 0 to {vocab_size - 1}, the model's vocabulary"
            )
    return [int(token) for token in ids]


def as_generation(
    result: object, sampling: SamplingParams, *, vocab_size: int, weight_version: int
) -> Generation:
    """Check what a function returned.

    It ends by "stop" where the policy itself ended it with one of `sampling.stop_token_ids`; only then it has a score.

    Raises:
        InvalidSample: it is no sample, or an impossible one.
    """
    sample = result.sample() if isinstance(result, Conversation) else result
    if not isinstance(sample, FunctionSample):
        raise InvalidSample(
            f"it returned {type(sample).__name__}; expected a Conversation or a FunctionSample of "
            "megatron_laser.rollout.function"
        )
    ids, mask = check_ids(sample.ids, vocab_size, "the response"), np.asarray(sample.sampled, dtype=np.bool_)
    logprobs = np.asarray(sample.logprobs, dtype=np.float32)
    if mask.shape != (len(ids),) or logprobs.shape != (len(ids),):
        raise InvalidSample(
            f"a response of {len(ids)} ids with a mask of {mask.shape} and log-probs of {logprobs.shape}: "
            "expected one entry of each for each id"
        )
    if len(ids) > sampling.max_new_tokens:
        raise InvalidSample(
            f"a response of {len(ids)} tokens; expected at most rollout.max_new_tokens {sampling.max_new_tokens}, what "
            "the environment wrote included"
        )
    if not mask.any():
        raise InvalidSample("the policy sampled no token of the response: there is nothing to learn from")
    if not np.isfinite(logprobs[mask]).all():
        raise InvalidSample("a log-prob of a sampled token is not finite")
    spans = _spans(sample.weight_versions, int(mask.sum()), weight_version)
    stopped = bool(mask[-1]) and ids[-1] in sampling.stop_token_ids
    return Generation(
        np.array(ids, dtype=np.int32),
        np.where(mask, logprobs, np.float32(0.0)),
        "stop" if stopped else "length",
        min(span.version for span in spans),
        spans=spans,
        sampled=None if mask.all() else mask,
        cut_off=not stopped and (bool(sample.cut_off) or len(ids) >= sampling.max_new_tokens),
    )


def _spans(versions: Sequence[tuple[int, int]], tokens: int, own: int) -> tuple[WeightSpan, ...]:
    """Of the sampled tokens; neighbours of one version are one span."""
    spans: list[WeightSpan] = []
    for version, count in versions or [(own, tokens)]:
        if spans and spans[-1].version == version:
            spans[-1] = WeightSpan(version, spans[-1].tokens + count)
        elif count:
            spans.append(WeightSpan(version, count))
    if sum(span.tokens for span in spans) != tokens:
        raise InvalidSample(
            f"weight_versions names {sum(span.tokens for span in spans)} tokens; {tokens} were sampled"
        )
    return tuple(spans)
