"""Long answers read straight into arrays: what `orjson` and plain loops make of the same bytes, or the same error."""

import json
import struct
from unittest import mock

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_laser.rollout import answer_arrays
from megatron_laser.rollout.answer_arrays import TokenLogprobs, read_answer
from megatron_laser.rollout.sampled_sets import parse_sets
from megatron_laser.rollout.sglang_api import WireError, parse_generate
from megatron_laser.types import TokenSets

VOCABULARY = 152_000


def outcome(read, raw, vocab_size=VOCABULARY):
    """What becomes of an answer: (ids, bits of the log-probs, finish reason, version), or the error."""
    try:
        reply = parse_generate(read(raw), vocab_size, max_new_tokens=100, prompt_tokens=3)
    except orjson.JSONDecodeError as error:
        return "no JSON", str(error)
    except (WireError, LookupError, TypeError) as error:
        return type(error).__name__, str(error)
    assert reply.ids.dtype == np.int32 and reply.logprobs.dtype == np.float32
    return reply.ids.tolist(), reply.logprobs.view(np.uint32).tolist(), reply.finish_reason, reply.version


def fast(raw):
    with mock.patch.object(answer_arrays, "MIN_BYTES", 0):
        return read_answer(raw)


def as_json(body):
    """With lists in place of arrays."""
    body["output_ids"] = body["output_ids"].tolist()
    entries = body["meta_info"]["output_token_logprobs"]
    body["meta_info"]["output_token_logprobs"] = entries.entries()
    return body


def answer(ids, entries, *, text="", before="", after="", reason="length"):
    """The bytes of an answer, from the JSON of its parts."""
    return (
        f'{{"text":{json.dumps(text)},"output_ids":[{",".join(ids)}],"meta_info":{{"id":"r","finish_reason":{{"type":'
        f'"{reason}"}},"prompt_tokens":3,"weight_version":"v",{before}"output_token_logprobs":[{",".join(entries)}]'
        f"{after}}}}}"
    ).encode()


def float32_as_json(bits):
    (value,) = struct.unpack("<f", struct.pack("<I", bits))
    return json.dumps(value)


floats = (
    st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-50.0, 0.0) | st.floats()
).map(lambda value: orjson.dumps(value).decode())


def one_of(words):
    return st.sampled_from(words.split("|"))


odd_numbers = one_of(
    "-0|-0.0|0|7|-3|1e-5|-1.5E+3|1E2|5e-324|1e39|-1e400|3.4028235677973366e38|123456789012345678901234567890|"
    "0.1000000000000000055511151231257827|-16777217|9007199254740993|NaN|Infinity|-Infinity|nan|null|true|+1|01|-01|.5|"
    '-.5|1.|1.e5|1.E5|--1|-||e5|1e|1e+|1e5.5| -0.5|-0.5 |\n1|"-0.5"|[1]|0x1|1_0|1,2|²'
)
numbers = floats | odd_numbers
ids = st.integers(0, VOCABULARY).map(str)
odd_ids = one_of(
    "0|99999999|100000000|4294967296|-1|-0|01|00|1.0|1e1|| 7|7 |null|true|"
    '"7"|[7]|+7|18446744073709551616|/|:|1/|7]|[7'
)
texts = st.sampled_from(
    ["", '"output_ids":[1,2]', '"output_token_logprobs":[[-1.0,5,null]]', "]]", '\x00\\"é\n', "[["]
)
fillers = one_of(
    '|"input_token_logprobs":[[null,3,null]],|"x":"\\"output_token_logprobs":1,|"x":{"output_ids":[9]},|"output_ids":[9],|'
    '"x":{"output_token_logprobs":[[-1.0,5,null]]},|"x\\"output_token_logprobs":[[-1,5,null]],|"completion_tokens":2,|'
    '"output_token_logprobs":[[-1.0,5,null]],|"a":"\\u0000","b":[[1],[2]],'
)
afters = st.sampled_from(
    ["", ',"output_top_logprobs":[[1],[2]]', ',"completion_tokens":1', ',"e":[[]]', ',"x":"]]"']
)


@given(st.lists(st.tuples(ids, floats), min_size=1, max_size=20), texts, afters)
@settings(deadline=None)
def test_an_answer_as_servers_write_it_is_read_without_lists_and_bit_by_bit(pairs, text, after):
    pairs = [
        (token, "-0.5" if value == "null" else value) for token, value in pairs
    ]  # orjson writes null for nan
    raw = answer([t for t, _ in pairs], [f"[{v},{t},null]" for t, v in pairs], text=text, after=after)
    body = fast(raw)
    assert isinstance(body["output_ids"], np.ndarray)
    assert isinstance(body["meta_info"]["output_token_logprobs"], TokenLogprobs)
    assert orjson.dumps(as_json(body)) == orjson.dumps(orjson.loads(raw))  # -0.0 is not 0.0
    assert outcome(fast, raw) == outcome(orjson.loads, raw)


@given(
    st.lists(
        st.tuples(ids | odd_ids, numbers, st.sampled_from(["null", '"a"', '"]],[["', "nul", ""])), max_size=4
    ),
    st.lists(ids | odd_ids, max_size=2),
    texts,
    fillers,
    afters,
    st.sampled_from(["length", "stop", "abort", "other"]),
)
@settings(deadline=None, max_examples=200)
def test_whatever_it_holds_the_result_or_the_error_is_the_plain_parsers(
    entries, more, text, before, after, reason
):
    ids = [token for token, _, _ in entries] + more[1:]
    raw = answer(
        ids, [f"[{v},{t},{w}]" for t, v, w in entries], text=text, before=before, after=after, reason=reason
    )
    assert outcome(fast, raw) == outcome(orjson.loads, raw)


WHOLE = answer(
    ["12", "7", "130001"], ["[-0.25,12,null]", "[-1.5e-05,7,null]", "[0.0,130001,null]"], text='a "b" ]]'
)


@given(
    st.integers(0, len(WHOLE) - 1),
    st.integers(0, 2),
    st.sampled_from([*'[]{},:".-+eE0159 nul\n\\', "", "]]", "[[", ",,", "null", "01"]),
)
@example(WHOLE.index(b"-0.25"), 1, "")
@settings(deadline=None, max_examples=500)
def test_bytes_that_are_lost_or_changed_end_as_with_the_plain_parser(place, removed, added):
    raw = WHOLE[:place] + added.encode() + WHOLE[place + removed :]
    assert outcome(fast, raw) == outcome(orjson.loads, raw)


def test_an_aborted_answer_without_tokens_or_logprobs_has_none():
    none = answer([], [], reason="abort")
    for raw in (none, none.replace(b'logprobs":[]', b'logprobs":null')):
        assert outcome(fast, raw) == outcome(orjson.loads, raw) == ([], [], "abort", "v")


def test_long_answers_only_are_read_so_and_every_form_of_a_number_is_exact():
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 40_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    tokens = rng.integers(0, VOCABULARY, len(values))
    entries = [[value, token, None] for value, token in zip(values.tolist(), tokens.tolist())]
    body = {
        "output_ids": tokens.tolist(),
        "meta_info": {
            "finish_reason": {"type": "stop"},
            "weight_version": "v",
            "output_token_logprobs": entries,
        },
    }
    read = read_answer(orjson.dumps(body))
    found = read["meta_info"]["output_token_logprobs"]
    assert np.array_equal(found.logprobs.astype(np.float32).view(np.uint32), values.view(np.uint32))
    assert found.ids.tolist() == read["output_ids"].tolist() == tokens.tolist()
    body["output_ids"], body["meta_info"]["output_token_logprobs"] = [5], [[-0.5, 5, None]]
    assert read_answer(orjson.dumps(body)) == body


def test_without_arrow_answers_are_read_plainly(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert fast(WHOLE) == orjson.loads(WHOLE)


def test_experts_are_left_as_their_characters():
    raw = answer(["12"], ["[-0.25,12,null]"], after=',"routed_experts":"AAAAAAEAAAA="')
    assert fast(raw)["meta_info"]["routed_experts"] == b"AAAAAAEAAAA="
    escaped = answer(["12"], ["[-0.25,12,null]"], after=',"routed_experts":"AA\\u0041="')
    assert fast(escaped)["meta_info"]["routed_experts"] == "AAA="


def test_a_log_prob_beyond_float32_is_none():
    with pytest.raises(WireError, match=r"-1e\+39: no float32"):
        parse_generate(
            fast(answer(["12"], ["[-1e39,12,null]"])), VOCABULARY, max_new_tokens=9, prompt_tokens=3
        )


def sets_of(read, raw):
    """What becomes of an answer's sets: counts and ids, or the error."""
    try:
        body = read(raw)
        sets, logprobs = parse_sets(body, np.asarray(body["output_ids"], np.int32), VOCABULARY)
    except (WireError, orjson.JSONDecodeError) as error:
        return type(error).__name__
    assert sets.counts.dtype == sets.ids.dtype == np.int32
    return sets.counts.tolist(), sets.ids.tolist(), logprobs.tolist()


@given(st.lists(st.lists(st.integers(0, VOCABULARY), min_size=1, max_size=4), min_size=1, max_size=6), texts)
def test_sets_are_read_as_orjson_reads_them(found, text):
    body = {
        "text": text,
        "output_ids": [one[-1] for one in found],
        "meta_info": {
            "output_token_logprobs": [[-0.5, one[-1], None] for one in found],
            "output_token_sampling_mask": found,
            "output_token_sampling_logprobs": [-0.25] * len(found),
        },
    }
    raw = orjson.dumps(body)
    assert sets_of(fast, raw) == sets_of(orjson.loads, raw)
    if not text:
        assert isinstance(fast(raw)["meta_info"]["output_token_sampling_mask"], TokenSets)


@pytest.mark.parametrize(
    "sets",
    [
        *("[[]]", "[[7],[]]", "[[7], [8]]", "[[7,8]]", "[[7],8]", "[[7]],[8]]", "[[7,],[8]]", "[[7],[8,9]"),
        *(
            "[[07],[8]]",
            "[[-7],[8]]",
            "[[7.0],[8]]",
            "[[[7]],[8]]",
            "[[7],[[8]]]",
            '[["7"],[8]]',
            "[[7],,[8]]",
        ),
        *("[[7],[152000,8]]", "[[7][8]]", "[[7,[8]]", "[[7],8]]", "[[7],[8]]", "[[99999999999],[8]]"),
    ],
)
def test_odd_sets_come_to_what_orjson_makes_of_them(sets):
    raw = (
        '{"output_ids":[7,8],"meta_info":{"output_token_logprobs":[[-0.5,7,null],[-0.5,8,null]],'
        f'"output_token_sampling_mask":{sets},"output_token_sampling_logprobs":[-0.25,-0.25]}}}}'
    ).encode()
    assert sets_of(fast, raw) == sets_of(orjson.loads, raw)
    assert (sets_of(fast, raw) == ([1, 1], [7, 8], [-0.25, -0.25])) == (sets in ("[[7],[8]]", "[[7], [8]]"))
