"""A run in which no response ends by itself says why, and does not go on for ever without a single score."""

import logging

import pytest

from megatron_laser.rollout.endings import Endings, NothingEnds
from megatron_laser.run.engines import call_engine
from megatron_laser.types import Generation, Group, Prompt, Sample

STOP, LIMIT = 1, 4
SPECIAL = {STOP: "<eos>", 2: "<|im_end|>", 3: "<|score|>"}


def group(*responses, graded=True):
    samples = []
    for ids in responses:
        generation = Generation(list(ids), [-1.0] * len(ids), "stop" if ids[-1] == STOP else "length", 0)
        samples.append(Sample([5], generation, "", generation.is_scored((STOP,)), 0.0, "wrong"))
    prompt = Prompt(0, "", "", [5])
    return Group(prompt, samples) if graded else Group(prompt, [], samples)


CUT = group([7, 8, 9, 9], [7, 7, 7, 7])
ENDED = group([7, 8, 9, 9], [7, STOP])


def endings(limit=3, steps=100, **settings):
    return Endings((STOP,), max_new_tokens=LIMIT, steps=steps, limit=limit, special=SPECIAL, **settings)


def test_the_run_stops_after_so_many_steps_in_a_row_and_one_ended_response_begins_the_count_anew():
    made = endings()
    for step, found in enumerate([CUT, CUT, ENDED, CUT, CUT], start=1):
        made.note(step, [found])
    with pytest.raises(
        NothingEnds, match=r"in 3 steps in a row \(laser\.max_unscored_steps\) no response ended"
    ):
        made.note(6, [CUT])


def test_the_likely_end_is_the_special_token_that_stands_in_the_responses():
    other = group([7, 2, 9, 2], [7, 8, 2, 3])
    with pytest.raises(NothingEnds) as caught:
        endings(limit=1).note(1, [other, CUT])
    text = str(caught.value)
    assert "4 of 4 were cut at rollout.max_new_tokens 4; they end at 1 (<eos>)" in text
    assert "2 of them have 2 (<|im_end|>) in them" in text
    assert "set rollout.stop_token_ids: [1, 2]" in text
    for by_chance in ([CUT], [CUT, group([7, 2, 9, 9], [7, 8, 8, 3])]):
        with pytest.raises(
            NothingEnds, match=r"Raise rollout\.max_new_tokens, or name what the policy really"
        ):
            endings(limit=1).note(1, by_chance)


def test_a_short_run_does_not_end_without_any_score_but_one_that_had_some_does():
    whole, some = endings(limit=10, steps=2), endings(limit=10, steps=3)
    whole.note(1, [CUT])
    with pytest.raises(NothingEnds, match="in all 2 steps of the run no response ended by itself"):
        whole.note(2, [CUT])
    for step, found in enumerate([ENDED, CUT, CUT], start=1):
        some.note(step, [found])


def test_a_run_without_scores_or_by_wish_goes_on_and_says_it_once(caplog):
    made = endings(limit=None, steps=5)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            made.note(step, [CUT])
    assert caplog.text.count("no response ended by itself, so none has a score: 2 of 2 were cut") == 1


def test_what_could_not_be_graded_ended_all_the_same_and_an_empty_step_says_nothing():
    made = endings(limit=1)
    made.note(1, [CUT, group([7, STOP], graded=False)])
    made.note(2, [])
    assert made.in_a_row == 0


def test_the_run_saves_and_stops_with_the_message():
    def collect():
        raise NothingEnds("in 3 steps in a row")

    assert call_engine("rollout of step 3", collect) == "rollout of step 3: in 3 steps in a row"
