"""The long lists of a server's answer, from its bytes to arrays without a Python object for each number.

An answer of 32,768 tokens has 1.4 MB: `output_ids`, and `output_token_logprobs` with [log-prob, id, null] for each.
As Python objects they cost 18 ms on an idle core, all of it under the interpreter's lock; here it is 6 ms, two thirds
of which NumPy and Arrow spend outside of it. What this cannot be sure of it leaves to `orjson`: the result is the same,
bit by bit.

How it can be sure: a list is cut out of the bytes where its key stands and a marker put in its place; `orjson` reads
the rest, and must find the markers where it would have found the lists. A list itself is compared byte by byte with the
one form that servers write, without white space; each number with JSON's grammar.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_laser.types import TokenSets

MIN_BYTES = 32_768
"""Shorter answers are read by `orjson` at once."""

_MARKER = secrets.token_hex(16)  # nobody else's string can be it
_IDS = b'"output_ids":['
_LOGPROBS = b'"output_token_logprobs":[['
_SETS = b'"output_token_sampling_mask":[['
_EXPERTS = b'"routed_experts":"'
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """`output_token_logprobs`: logprobs [tokens] float64, nats, as the JSON has them; ids [tokens] int32."""

    logprobs: npt.NDArray[np.float64]
    ids: npt.NDArray[np.int32]

    def entries(self) -> list[list[Any]]:
        """As JSON has it."""
        return [[logprob, token, None] for logprob, token in zip(self.logprobs.tolist(), self.ids.tolist())]


def as_float32(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Rounded; what is beyond becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


class NotTheForm(Exception):
    """Bytes that are not what a server writes, or nothing that this can vouch for."""


def read_answer(raw: bytes) -> Any:
    """`orjson.loads(raw)`; in a long answer to `GENERATE` arrays stand for long lists.

    `output_ids` is [tokens] int32, `output_token_logprobs` a `TokenLogprobs`, `output_token_sampling_mask` a
    `TokenSets`, and `routed_experts` is its characters as bytes. Raises orjson.JSONDecodeError for what is no JSON.
    """
    if len(raw) >= MIN_BYTES:
        try:
            return _with_arrays(raw)
        except (NotTheForm, ImportError):  # without Arrow, too
            pass
    return orjson.loads(raw)


def _with_arrays(raw: bytes) -> Any:
    spans: list[tuple[int, int, str]] = []
    values: dict[str, Any] = {}
    start = raw.find(_IDS)
    if start >= 0:
        start += len(_IDS) - 1
        end = raw.find(b"]", start) + 1
        values["output_ids"] = _read_ids(raw, start, end)
        spans.append((start, end, "output_ids"))
    start = raw.find(_LOGPROBS)
    if start >= 0:
        start += len(_LOGPROBS) - 2
        # Mostly the last such list: seen from the end, its 32,768 brackets need not be looked at.
        for end in (raw.rfind(b"]]", start) + 2, raw.find(b"]]", start) + 2):
            try:
                values["output_token_logprobs"] = _read_logprobs(raw, start, end)
                break
            except NotTheForm:
                continue
        else:
            raise NotTheForm
        spans.append((start, end, "output_token_logprobs"))
    start = raw.find(_SETS)
    if start >= 0:
        start += len(_SETS) - 2
        end = raw.find(b"]]", start) + 2
        values["output_token_sampling_mask"] = _read_sets(raw, start, end)
        spans.append((start, end, "output_token_sampling_mask"))
    start = raw.find(_EXPERTS, spans[-1][1] if spans else 0)  # servers write it behind the others
    if start >= 0:
        start += len(_EXPERTS) - 1
        end = raw.find(b'"', start + 1) + 1
        text = raw[start + 1 : end - 1]
        if end <= start or text.translate(None, _BASE64):
            raise NotTheForm
        values["routed_experts"] = text
        spans.append((start, end, "routed_experts"))
    if not spans:
        raise NotTheForm
    body = _rest(raw, sorted(spans))
    meta = body.get("meta_info") if isinstance(body, dict) else None
    for name, value in values.items():
        place = body if name == "output_ids" else meta
        if not isinstance(place, dict) or place.get(name) != _MARKER + name:
            raise NotTheForm
        place[name] = value
    return body


def _rest(raw: bytes, spans: list[tuple[int, int, str]]) -> Any:
    """Everything but the spans, which have a marker instead."""
    parts = []
    done = 0
    for start, end, name in spans:
        if start < done:  # one within the other
            raise NotTheForm
        parts += [raw[done:start], f'"{_MARKER}{name}"'.encode()]
        done = end
    try:
        return orjson.loads(b"".join([*parts, raw[done:]]))
    except orjson.JSONDecodeError:
        raise NotTheForm from None


def _read_ids(raw: bytes, start: int, end: int) -> npt.NDArray[np.int32]:
    """`[1,2]`, which is raw[start:end]."""
    text = np.frombuffer(raw, np.uint8)
    commas = np.flatnonzero(text[start:end] == ord(",")) + start
    return _whole_numbers(raw, np.append(start, commas) + 1, np.append(commas, end - 1))


def _read_logprobs(raw: bytes, start: int, end: int) -> TokenLogprobs:
    """`[[-0.5,1,null],[-0.25,2,null]]`, which is raw[start:end]."""
    text = np.frombuffer(raw, np.uint8)
    commas = np.flatnonzero(text[start:end] == ord(",")) + start
    if len(commas) % 3 != 2:
        raise NotTheForm
    # Of each entry the comma behind the log-prob, that behind the id, and what is behind it.
    first, second, behind = np.append(commas, end - 1).reshape(-1, 3).T
    begin = np.append(start, behind[:-1]) + 1  # its opening bracket
    four = np.ndarray((len(raw) - 3,), "<u4", raw, strides=(1,))
    if not (
        (behind == second + 6).all()
        and (four[second + 1] == int.from_bytes(b"null", "little")).all()
        and (text[second + 5] == ord("]")).all()
        and (text[begin] == ord("[")).all()
    ):
        raise NotTheForm
    return TokenLogprobs(_decimals(raw, begin + 1, first), _whole_numbers(raw, first + 1, second))


def _read_sets(raw: bytes, start: int, end: int) -> TokenSets:
    """`[[1,2],[3]]`, which is raw[start:end]; no set is empty."""
    text = np.frombuffer(raw, np.uint8)
    commas = np.flatnonzero(text[start:end] == ord(",")) + start
    between = text[commas - 1] == ord("]")  # sets, not ids
    if (between != (text[commas + 1] == ord("["))).any():
        raise NotTheForm
    ids = _whole_numbers(
        raw, np.append(start + 2, commas + 1 + between), np.append(commas - between, end - 2)
    )
    bounds = np.concatenate(([0], np.flatnonzero(between) + 1, [len(ids)]))
    return TokenSets(np.diff(bounds).astype(np.int32), ids)


def _decimals(raw: bytes, begins: Places, ends: Places) -> npt.NDArray[np.float64]:
    """The numbers raw[begin:end]: rounded as `float` does it, by Arrow."""
    import pyarrow  # 0.1 s, once

    text = np.frombuffer(raw, np.uint8)
    if (ends <= begins).any():
        raise NotTheForm
    # Arrow takes more than JSON has: +1, 01, .5, 1., 1.e5, inf, nan, spaces.
    digit = text[begins + (text[begins] == ord("-"))]
    after = text[begins + (text[begins] == ord("-")) + 1]  # behind the first digit; the comma at the latest
    leading_zero = (digit == ord("0")) & _is_digit(after)
    minus_nought = (
        (digit == ord("0")) & (text[begins] == ord("-")) & (ends == begins + 2)
    )  # to JSON it is 0, not -0.0
    if not (_is_digit(digit) & _is_digit(text[ends - 1]) & ~leading_zero & ~minus_nought).all():
        raise NotTheForm
    low, high = int(begins[0]), int(ends[-1])
    exponents = np.flatnonzero((text[low:high] | ord(" ")) == ord("e")) + low  # E, too
    if not _is_digit(text[exponents - 1]).all():
        raise NotTheForm
    # One string array over the bytes as they are: numbers, and what is between them.
    bounds = np.empty(2 * len(begins), np.int32)
    bounds[0::2], bounds[1::2] = begins - low, ends - low
    everything = pyarrow.StringArray.from_buffers(
        len(bounds) - 1, pyarrow.py_buffer(bounds), pyarrow.py_buffer(memoryview(raw)[low:high])
    )
    try:
        numbers = everything.take(pyarrow.array(np.arange(0, len(bounds), 2, dtype=np.int32)))
        values: npt.NDArray[np.float64] = numbers.cast(pyarrow.float64()).to_numpy()
    except pyarrow.ArrowInvalid:
        raise NotTheForm from None
    if not np.isfinite(values).all():
        raise NotTheForm
    return values


def _is_digit(characters: Bytes) -> npt.NDArray[np.bool_]:
    return (characters >= ord("0")) & (characters <= ord("9"))


# Of a word of eight characters, the last `length` ones, by length. The first character is the lowest byte.
_LAST = np.array([0, *((2**64 - 1) ^ (2 ** (64 - 8 * n) - 1) for n in range(1, 9))], np.uint64)
_NOUGHTS = np.uint64(0x3030303030303030)
_SIXES = np.uint64(0x0606060606060606)
_HIGH = np.uint64(0xF0F0F0F0F0F0F0F0)
_LOW = np.uint64(0x0F0F0F0F0F0F0F0F)


def _whole_numbers(raw: bytes, begins: Places, ends: Places) -> npt.NDArray[np.int32]:
    """The numbers raw[begin:end], of 1 to 8 digits, 8 characters before each in `raw`: eight digits at a time.

    The sums within a word are the known ones: 10 a + b of neighbours, 100 a + b of pairs, 10^4 a + b of halves.
    """
    lengths = ends - begins
    if lengths.min() < 1 or lengths.max() > 8:
        raise NotTheForm
    text = np.frombuffer(raw, np.uint8)
    if ((text[begins] == ord("0")) & (lengths > 1)).any():
        raise NotTheForm
    last = _LAST[lengths]
    word = np.ndarray((len(raw) - 7,), "<u8", raw, strides=(1,))[ends - 8]
    word = (word & last) | (_NOUGHTS & ~last)
    if ((word & _HIGH) != _NOUGHTS).any() or (((word + _SIXES) & _HIGH) != _NOUGHTS).any():
        raise NotTheForm
    word = ((word & _LOW) * np.uint64(10 * 2**8 + 1)) >> np.uint64(8)
    word = ((word & np.uint64(0x00FF00FF00FF00FF)) * np.uint64(100 * 2**16 + 1)) >> np.uint64(16)
    word = ((word & np.uint64(0x0000FFFF0000FFFF)) * np.uint64(10_000 * 2**32 + 1)) >> np.uint64(32)
    return word.astype(np.int32)
