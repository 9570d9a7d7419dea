"""A response's arrays: what they are made of, and when two responses say the same."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_laser.types import Generation, WeightSpan, as_int32

SAID = Generation([5, 6, 1], [-0.5, -1.0, -0.25], "stop", 3, zc_logprob=-23.0, spans=(WeightSpan(3, 3),))


def test_numbers_of_any_kind_become_the_arrays_that_are_sent() -> None:
    ids, logprobs = np.array([5, 6, 1], np.int32), np.array([-0.5, -1.0, -0.25], np.float32)
    other = Generation(ids, logprobs, "stop", 3)
    assert other.response_ids is ids and other.logprobs is logprobs  # not copied
    assert SAID.response_ids.dtype == np.int32 and SAID.logprobs.dtype == np.float32
    assert SAID.text_ids == [5, 6] and isinstance(SAID.text_ids[0], int)
    assert replace(SAID, finish_reason="length").text_ids == [5, 6, 1]
    assert SAID.is_scored((1,)) and not SAID.is_scored((2,))
    empty = Generation([], [], "abort", 0)
    assert empty.text_ids == [] and not empty.is_scored((1,))


@pytest.mark.parametrize("ids", [[2**31], [1, -(2**31) - 1], np.array([2**40])])
def test_an_id_that_does_not_fit_is_refused(ids) -> None:
    with pytest.raises(OverflowError, match="does not fit int32"):
        as_int32(ids)


def test_responses_are_equal_when_they_say_the_same() -> None:
    same = replace(SAID, response_ids=[5, 6, 1], routed_experts=np.zeros((2, 1, 2), np.uint8))
    assert same == SAID and SAID != "SAID"
    for change in (
        {"response_ids": [5, 6, 2]},
        {"response_ids": [5, 6], "logprobs": [-0.5, -1.0]},
        {"logprobs": [-0.5, -1.0, -0.5]},
        {"finish_reason": "length"},
        {"weight_version": 2},
        {"zc_logprob": None},
        {"spans": ()},
    ):
        assert replace(SAID, **change) != SAID, change
