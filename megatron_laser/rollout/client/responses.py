"""Responses: the weights that they must come from, the parts that they come in, and what is counted of requests."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from megatron_laser.rollout.engine import StoppedEarly
from megatron_laser.rollout.routed_experts import Routed, joined_routing
from megatron_laser.rollout.sampled_sets import joined_sets
from megatron_laser.rollout.sglang_api import Reply
from megatron_laser.types import FinishReason, Generation, SamplingParams, TokenSets, WeightSpan


@dataclass(frozen=True)
class Weights:
    """The weights that answers must come from: the servers' name for them, and the step."""

    label: str | None
    version: int


def joined(
    partial: Generation | None,
    reply: Reply,
    version: int,
    sampling: SamplingParams,
    routed: Routed | None = None,
    sets: TokenSets | None = None,
) -> Generation:
    """What a response has after `reply`, which weights of `version` gave; `partial`: what it had before.

    routed: where the tokens went whose experts were not known before. sets: of the tokens of `reply`.
    """
    ids, logprobs = reply.ids, reply.logprobs
    if partial is not None:
        ids = np.concatenate([partial.response_ids, ids])
        logprobs = np.concatenate([partial.logprobs, logprobs])
    spans = (*(() if partial is None else partial.spans), WeightSpan(version, len(reply.ids)))
    # Weights under which a request was only queued have sampled nothing of it.
    spans = tuple(span for span in spans if span.tokens) or spans[-1:]
    return Generation(
        ids,
        logprobs,
        _how_it_ended(reply.finish_reason, ids, sampling),
        min(span.version for span in spans),
        spans=spans,
        routed_experts=joined_routing(partial, routed),
        sets=joined_sets(partial, sets, len(reply.ids)),
    )


def _how_it_ended(reason: FinishReason, ids: npt.NDArray[np.int32], sampling: SamplingParams) -> FinishReason:
    # An abort takes effect behind the token that is being made, and hides that this was the last one. Such a
    # response must not be continued behind its end.
    if reason != "abort" or not len(ids):
        return reason
    if int(ids[-1]) in sampling.stop_token_ids:
        return "stop"
    return "length" if len(ids) >= sampling.max_new_tokens else "abort"


def require_finished(generation: Generation | None) -> Generation:
    """A finished response. Raises StoppedEarly for one that was not begun or was aborted."""
    if generation is None or generation.finish_reason == "abort":
        raise StoppedEarly("the servers were told to stop generating")
    return generation


@dataclass
class RequestStats:
    """Counts since they were last taken; seconds are summed over requests.

    unrouted: responses that were asked for with their experts and came without those of all tokens.
    """

    requests: int = 0
    retries: int = 0
    stale_replies: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generate_seconds: float = 0.0
    scores: int = 0
    score_tokens: int = 0
    score_cached_tokens: int = 0
    score_seconds: float = 0.0
    unrouted: int = 0

    def metrics(self) -> dict[str, float]:
        """As metrics.jsonl names them."""
        found = {
            "rollout/requests": float(self.requests),
            "rollout/retries": float(self.retries),
            "rollout/stale_replies": float(self.stale_replies),
            "rollout/prefix_cached_fraction": self.cached_tokens / max(1, self.prompt_tokens),
        }
        read = self.prompt_tokens + self.score_tokens
        if read:
            found["servers/cache_hit_rate"] = (self.cached_tokens + self.score_cached_tokens) / read
        if self.unrouted:
            found["rollout/unrouted_responses"] = float(self.unrouted)
        if self.scores:
            found["rollout/score_cached_fraction"] = self.score_cached_tokens / max(1, self.score_tokens)
            found["rollout/score_uncached_tokens"] = (
                self.score_tokens - self.score_cached_tokens
            ) / self.scores
            found["rollout/score_time_fraction"] = self.score_seconds / max(
                1e-9, self.score_seconds + self.generate_seconds
            )
        return found

    def take(self) -> dict[str, float]:
        """The metrics; counting starts anew."""
        found = self.metrics()
        for each in fields(self):
            setattr(self, each.name, type(getattr(self, each.name))())
        return found
