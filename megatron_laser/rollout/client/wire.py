"""SGLang's JSON, both ways: pure functions between our types and the bodies of `/generate`.

Shapes as measured on SGLang 0.5.23; a body that differs is a fault of the server, never a guess.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_laser.types import FinishReason, Generation, SamplingParams, WeightSpan

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class WireError(ValueError):
    """A body that is no answer to the request."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One finished request.

    Attributes:
        ids: the generated token ids, the stop token included.
        logprobs: one for each of `ids`, nats, of logits / temperature.
        finish_reason: `abort` when it was aborted, with what it had by then.
        version: the server's name of the weights at the end of the request.
        versions: the names of all weights that generated a part of it.
        prompt_tokens, cached_tokens: tokens of the input, and how many of them the prefix cache held.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    version: str
    versions: tuple[str, ...]
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class ScoreReply:
    """log pi(token | input) in nats; the rest as in `Reply`."""

    logprob: float
    version: str
    prompt_tokens: int
    cached_tokens: int

    @property
    def versions(self) -> tuple[str, ...]:
        """As in `Reply`."""
        return (self.version,)


def generate_body(
    input_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    max_new_tokens: int,
    rid: str,
    place: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """The body of a request for one response.

    Servers with deterministic inference sample by `sampling_seed`, and where it is missing take one and the same for
    every request, so that all responses to a prompt were equal; the others ignore it.

    Args:
        place: (prompt, sample) of the response within its call, for its seed.
    """
    seed = {} if sampling.seed is None else {"sampling_seed": response_seed(sampling.seed, *place)}
    return {
        "input_ids": list(input_ids),
        "rid": rid,
        "return_logprob": True,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            "skip_special_tokens": False,
            **seed,
        },
    }


def response_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of one response, 0 to 2^63 - 1: another one for each (prompt, sample) of a call and each call's `seed`.

    A server makes a token's random numbers of this seed and the token's position alone.
    """
    digest = hashlib.blake2b(f"{seed} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def score_body(input_ids: Sequence[int], token_id: int, *, rid: str) -> dict[str, Any]:
    """The body of a request for log pi(token_id | input_ids) at temperature 1: no token is generated.

    After a generation the prefix cache holds all but the last of `input_ids`. The priority counts where the servers'
    option `enable_priority_scheduling` is on: requests without one come after it.
    """
    return {
        "input_ids": list(input_ids),
        "rid": rid,
        "return_logprob": True,
        "token_ids_logprob": [token_id],
        "priority": 1,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
    }


def parse_generate(body: Any, vocab_size: int, *, max_new_tokens: int, prompt_tokens: int) -> Reply:
    """The answer to one `generate_body` with an input of `prompt_tokens` ids.

    Raises WireError when `body` is not that.
    """
    meta = _meta(body)
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind not in _FINISH:
        raise WireError(f"finish_reason {reason!r}")
    ids = body.get("output_ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
        raise WireError(f"output_ids that are not token ids below {vocab_size}: {str(ids)[:200]}")
    stated = meta.get("completion_tokens", len(ids))
    if stated != len(ids) and kind != "abort":  # an aborted request's counts may lag behind its tokens
        raise WireError(f"{len(ids)} output_ids but completion_tokens {stated!r}")
    if len(ids) > max_new_tokens:
        raise WireError(f"{len(ids)} output_ids where at most {max_new_tokens} were asked for")
    if not ids and kind != "abort" and max_new_tokens > 0:
        raise WireError(f"no output_ids, and finish_reason {kind!r}")
    entries = meta.get("output_token_logprobs")
    entries = [] if entries is None and not ids else entries
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise WireError(
            f"{len(ids)} output_ids but output_token_logprobs {str(entries)[:200]}: expected one for each"
        )
    logprobs = []
    for token, entry in zip(ids, entries):
        if entry[1] != token:
            raise WireError(f"output_token_logprobs are of token {entry[1]} where output_ids has {token}")
        logprobs.append(_finite(entry[0], "output_token_logprobs"))
    return Reply(
        ids,
        logprobs,
        _FINISH[kind],
        _version(meta),
        (*(span["version"] for span in meta.get("weight_versions") or ()), _version(meta)),
        *_input_tokens(meta, prompt_tokens),
    )


def joined(partial: Generation | None, reply: Reply, version: int, sampling: SamplingParams) -> Generation:
    """What a response has after `reply`, which weights of `version` gave; `partial`: what it had before."""
    before = Generation([], [], "abort", version) if partial is None else partial
    ids = [*before.response_ids, *reply.ids]
    spans = (*before.spans, WeightSpan(version, len(reply.ids)))
    # Weights under which a request was only queued have sampled nothing of it.
    spans = tuple(span for span in spans if span.tokens) or spans[-1:]
    return Generation(
        ids,
        [*before.logprobs, *reply.logprobs],
        _how_it_ended(reply.finish_reason, ids, sampling),
        min(span.version for span in spans),
        spans=spans,
    )


def _how_it_ended(reason: FinishReason, ids: list[int], sampling: SamplingParams) -> FinishReason:
    # An abort takes effect behind the token that is being made, and hides that this was the last one. Such a
    # response must not be continued behind its end.
    if reason != "abort" or not ids:
        return reason
    if ids[-1] in sampling.stop_token_ids:
        return "stop"
    return "length" if len(ids) >= sampling.max_new_tokens else "abort"


def abort_message(body: Any) -> str | None:
    """Why the server itself aborted a request (a bad input); None for one that somebody else aborted."""
    reason = _meta(body).get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort" and reason.get("status_code"):
        return f"{reason['status_code']}: {reason.get('message')}"
    return None


def parse_score(body: Any, token_id: int, *, prompt_tokens: int) -> ScoreReply:
    """The answer to one `score_body` with `prompt_tokens` ids. Raises WireError when `body` is not that."""
    meta = _meta(body)
    try:
        logprob, token = meta["output_token_ids_logprobs"][0][0][:2]
    except (KeyError, IndexError, TypeError):
        raise WireError(f"no output_token_ids_logprobs in {str(meta)[:300]}") from None
    if token != token_id:
        raise WireError(f"the log-prob of token {token} instead of {token_id}")
    return ScoreReply(
        _finite(logprob, "output_token_ids_logprobs"),
        _version(meta),
        *_input_tokens(meta, prompt_tokens),
    )


def _meta(body: Any) -> dict[str, Any]:
    meta = body.get("meta_info") if isinstance(body, dict) else None
    if not isinstance(meta, dict):
        raise WireError(f"no meta_info in {str(body)[:300]}")
    return meta


def _input_tokens(meta: dict[str, Any], sent: int) -> tuple[int, int]:
    """Tokens of the input, and how many of them came from the prefix cache."""
    read = meta.get("prompt_tokens", sent)
    if read != sent:
        raise WireError(f"prompt_tokens {read!r} for an input of {sent} ids: an answer to another request")
    cached = meta.get("cached_tokens", 0)
    return sent, cached if isinstance(cached, int) else 0


def _version(meta: dict[str, Any]) -> str:
    version = meta.get("weight_version")
    if not isinstance(version, str):
        raise WireError(f"weight_version {version!r}: needed to know which weights answered")
    return version


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WireError(f"{name} has {value!r}: expected a number")
    return float(value)
