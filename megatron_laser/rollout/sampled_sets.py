"""The tokens that servers sampled each token from: asked for with a response, and checked.

SGLang's sampler itself says which tokens were left to it and what probability the chosen one had among them
(`return_sampling_mask`, read in SGLang 0.5.23: `layers/sampler.py`, `managers/tokenizer_manager.py`). So nothing is
guessed of the order of its filters, of ties at their edges, or of rounding, which differ between its backends. It wants
a finite `top_k` for that; ties may give a set more members.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laser.rollout.sglang_api import WireError
from megatron_laser.types import Generation, SamplingParams, TokenSets

_SETS, _LOGPROBS = "output_token_sampling_mask", "output_token_sampling_logprobs"


def sets_request(sampling: SamplingParams) -> dict[str, Any]:
    """What the body of a request has besides, for an answer with sets."""
    return {} if sampling.top_k is None else {"return_sampling_mask": True}


def parse_sets(
    answer: Any, ids: npt.NDArray[np.int32], vocab_size: int
) -> tuple[TokenSets, npt.NDArray[np.float32]]:
    """The sets of the answer's tokens [tokens], and each one's log-prob [tokens] in its set.

    Raises WireError for an answer without them, or with others.
    """
    meta = answer["meta_info"]
    found = meta.get(_SETS)
    sets = _sets([] if found is None else found, vocab_size)
    values = meta.get(_LOGPROBS) or []
    if not len(sets) == len(values) == len(ids):
        raise WireError(
            f"{len(ids)} output_ids but {len(sets)} sets in {_SETS} and {len(values)} {_LOGPROBS}: expected one of "
            "each for each token"
        )
    if len(ids) and not sets.counts.all():
        raise WireError(f"{_SETS} has no member for token {int(np.argmin(sets.counts))}")
    wrong = sets.first_without(ids)
    if wrong is not None:
        raise WireError(f"{_SETS} lacks token {int(ids[wrong])} itself, which was sampled")
    try:
        logprobs = np.array(values, np.float32)
    except (TypeError, ValueError):
        logprobs = np.zeros(0, np.float32)
    if logprobs.shape != (len(ids),) or not np.isfinite(logprobs).all():
        raise WireError(f"{_LOGPROBS} {str(values)[:200]}: expected a number for each token")
    return sets, logprobs


def _sets(found: Any, vocab_size: int) -> TokenSets:
    if isinstance(found, TokenSets):  # of a long answer, see `read_answer`
        if len(found.ids) and found.ids.max() >= vocab_size:
            raise WireError(f"{_SETS} with {int(found.ids.max())}: expected token ids below {vocab_size}")
        return found
    if not isinstance(found, list) or not all(isinstance(one, list) for one in found):
        raise WireError(f"{_SETS} {str(found)[:200]}: expected a list of ids for each token")
    flat = list(chain.from_iterable(found))
    # Hundreds of thousands of a long response: no loop in Python over them.
    whole = set(map(type, flat)) <= {int}
    if not whole or (flat and not 0 <= min(flat) <= max(flat) < vocab_size):
        raise WireError(f"{_SETS} with what is no token id below {vocab_size}: {str(found)[:200]}")
    return TokenSets(np.array([*map(len, found)], np.int32), np.array(flat, np.int32))


def joined_sets(partial: Generation | None, later: TokenSets | None, tokens: int) -> TokenSets | None:
    """The sets of a response after an answer of `tokens` tokens that began where `partial` ends."""
    earlier = None if partial is None else partial.sets
    if earlier is None and later is None:
        return None
    had = 0 if partial is None else len(partial.response_ids)
    return TokenSets.join(
        [
            TokenSets.whole(had) if earlier is None else earlier,
            TokenSets.whole(tokens) if later is None else later,
        ]
    )
