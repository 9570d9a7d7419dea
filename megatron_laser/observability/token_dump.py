"""What a dump of rollouts says of each token: log-probs of engine and trainer, entropy, where its text ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laser.types import Sample

DIGITS = 5  # significant ones; a log-prob's sixth says nothing to a reader, and costs a fifth of the file
Decode = Callable[[Sequence[int]], str]
Readings = dict[str, list[tuple[int, float | None]]]

_BROKEN = "\ufffd"  # what is decoded of bytes that are only a part of a character


@dataclass(frozen=True)
class TokenValues:
    """What the trainer read of each response token of a batch before its update; on rank 0.

    policy_logprobs, entropy: [sum of response lengths] float32, nats, in the order of `FlatBatch.rollout_logprobs`: of
    logits / temperature, as the engine's; NaN where the policy did not sample the token.
    """

    policy_logprobs: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]


def token_fields(
    sample: Sample,
    values: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None,
    readings: Readings,
    decode: Decode,
) -> dict[str, Any]:
    """The fields of one response.

    Args:
        values: [tokens] the trainer's log-probs and entropies; None: it read none.
        readings: of each readout (offset in tokens, score). decode: ids to text without special tokens.
    """
    generation = sample.generation
    engine = np.where(generation.sampled_mask, generation.logprobs, np.nan)
    return {
        "prompt": decode(sample.prompt_ids),
        "token_ends": token_ends(sample.text, generation.text_ids, len(generation.response_ids), decode),
        "token_logprobs": significant(engine),
        "token_policy_logprobs": None if values is None else significant(values[0]),
        "token_entropy": None if values is None else significant(values[1]),
        "readouts": {
            name: [
                [int(offset), None if score is None else significant([score])[0]] for offset, score in places
            ]
            for name, places in readings.items()
        },
    }


def significant(
    values: Sequence[float] | npt.NDArray[np.floating], digits: int = DIGITS
) -> list[float | None]:
    """Rounded to so many significant digits; None for what is not finite."""
    exact = np.asarray(values, dtype=np.float64)
    sizes = np.abs(exact)
    known = np.isfinite(exact) & (sizes > 0)
    power = digits - 1 - np.floor(np.log10(np.where(known, sizes, 1.0)))
    # Where it would be a power of ten below 1, the power above 1 is divided by: it is exact, so the result ends there.
    up, down = 10.0 ** np.maximum(power, 0), 10.0 ** np.maximum(-power, 0)
    rounded = np.rint(np.where(known, exact, 0.0) * up / down) * down / up
    return [value if finite else None for value, finite in zip(rounded.tolist(), np.isfinite(exact).tolist())]


def token_ends(text: str, ids: Sequence[int], count: int, decode: Decode) -> list[int]:
    """[count] where each token's part of `text` ends, in characters; not decreasing.

    A character of several tokens belongs to the last of them; special tokens and those that end a response have no
    text.

    Args:
        ids: what `text` was decoded from: the first tokens of the response. count: of all its tokens.
    """
    anchor = [ids[0]] if len(ids) else []
    head = decode(anchor)
    pieces: dict[int, str] = {}

    def piece(token: int) -> str:
        """Behind another token, where a blank that a word begins with is kept."""
        if token not in pieces:
            pieces[token] = decode([*anchor, token])[len(head) :]
        return pieces[token]

    parts = [head, *(piece(token) for token in ids[1:])][: len(ids)]
    if "".join(parts) != text or _BROKEN in text:
        parts = _in_context(ids, decode)
    ends = np.minimum(np.cumsum([len(part) for part in parts], dtype=np.int64), len(text)).tolist()
    if ends:
        ends[-1] = len(text)
    return [*ends, *([len(text)] * (count - len(ends)))]


def _in_context(ids: Sequence[int], decode: Decode) -> list[str]:
    """Each token's text behind the tokens before it, "" until the bytes of a character are complete."""
    parts = []
    start = read = 0  # what is decoded begins a little before what is not known yet, so that blanks come out
    before = ""
    for index in range(len(ids)):
        now = decode(ids[start : index + 1])
        if now.endswith(_BROKEN) and index - read < 3:  # a character has at most four bytes
            parts.append("")
            continue
        parts.append(now[len(before) :])
        start, read = read, index + 1
        before = decode(ids[start:read])
    return parts


def by_response(values: TokenValues | None, lengths: Sequence[int]) -> list[Any]:
    """[samples] (log-probs, entropies) of each response, or None for all."""
    if values is None:
        return [None] * len(lengths)
    bounds = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return [(values.policy_logprobs[a:b], values.entropy[a:b]) for a, b in pairwise(bounds.tolist())]
