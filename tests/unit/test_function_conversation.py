"""Which samples of `rollout.function` were cut off: those that end in the middle of what the policy was saying."""

import json

import numpy as np
import pytest

from megatron_laser.rollout.function import Conversation, FunctionSample, Turn
from megatron_laser.rollout.function.conversation import as_generation
from megatron_laser.rollout.pending import generation_from, generation_state
from megatron_laser.types import Prompt, SamplingParams

STOP, CALL, ANSWER = 1, 3, 5
SAMPLING = SamplingParams(2, 8, (STOP,))
PROMPT = Prompt(3, "two and two", "4", [10, 11])


def turn(ids, behind, reason):
    return Turn(tuple(behind), tuple(ids), np.full(len(ids), -0.5, np.float32), reason, 4)


def said(*turns):
    """A conversation of turns (ids, how each ended, keep); None for one makes the environment speak."""
    talk = Conversation(PROMPT, SAMPLING)
    for one in turns:
        if one is None:
            talk.environment([ANSWER])
        else:
            ids, reason, keep = one
            talk.sampled(turn(ids, talk.ids, reason), keep=keep)
    return as_generation(talk, SAMPLING, vocab_size=20, weight_version=4)


@pytest.mark.parametrize(
    ("turns", "cut_off"),
    [
        ([([7, 8, 9], "length", None)], True),  # by the function's own limit, below max_new_tokens 8
        ([([7, CALL], "stop", None), None, ([8, 9], "length", None)], True),
        ([([7, 8], "length", None), None], False),  # the environment has the last word
        ([([7, 8], "length", None), None, ([9, STOP], "stop", None)], False),
        ([([7, CALL], "stop", None)], False),  # a stop token of the turn alone
        ([([7, 8, 9], "length", 2)], False),  # the function has ended it
        ([([7] * 7, "stop", None), None], True),  # no room for a word more
        ([([7] * 7 + [STOP], "stop", None)], False),
    ],
)
def test_a_sample_is_cut_off_where_the_policy_was_not_done(turns, cut_off):
    found = said(*turns)
    assert found.truncated is cut_off and found.finish_reason == (
        "stop" if found.is_scored((STOP,)) else "length"
    )
    assert generation_from(json.loads(json.dumps(generation_state(found)))).truncated is cut_off


def test_a_sample_without_a_conversation_says_itself_whether_it_was_cut_off():
    def found(**given):
        sample = FunctionSample([7, 8], [True, True], [-0.5, -0.5], **given)
        return as_generation(sample, SAMPLING, vocab_size=20, weight_version=4)

    assert not found().truncated and found(cut_off=True).truncated
