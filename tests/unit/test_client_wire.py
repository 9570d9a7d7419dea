"""Requests and answers of `/generate`: what is asked for, how a response ended, and whether it has a score."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_laser.rollout.client.driver import retried
from megatron_laser.rollout.client.errors import ServerFault, ServerRefused, ServersLost
from megatron_laser.rollout.client.responses import RequestStats, joined
from megatron_laser.rollout.sglang_api import Reply, generate_body, response_seed, score_body
from megatron_laser.types import Generation, SamplingParams, WeightSpan

STOPS = (1, 4)
SAMPLING = SamplingParams(2, 6, STOPS, temperature=0.7, top_p=0.9)


def reply(ids, reason):
    return Reply(
        np.array(ids, np.int32), np.full(len(ids), -0.5, np.float32), reason, "run-3", ("run-3",), 3, 2
    )


def test_a_generation_is_asked_for_as_it_will_be_trained_on():
    body = generate_body([7, 8], SAMPLING, max_new_tokens=5, rid="r")
    assert body["input_ids"] == [7, 8] and body["rid"] == "r" and body["return_logprob"] is True
    assert body["sampling_params"] == {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 5,
        "stop_token_ids": [1, 4],
        "skip_special_tokens": False,
    }


def test_each_response_has_a_seed_of_its_own_that_follows_from_the_call():
    """Equal seeds within a group would be equal responses, and without a seed a server takes 42 for all."""

    def seed_of(seed, place):
        body = generate_body([7], replace(SAMPLING, seed=seed), max_new_tokens=5, rid="r", place=place)
        return body["sampling_params"]["sampling_seed"]

    places = [(prompt, sample) for prompt in range(12) for sample in range(12)]
    seeds = {seed_of(seed, place) for seed in (0, 1, 2**31, 2**62 + 5) for place in places}
    assert len(seeds) == 4 * len(places) and all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert seed_of(3, (2, 1)) == seed_of(3, (2, 1)) == response_seed(3, 2, 1)


def test_a_score_is_one_position_of_the_raw_logits_and_generates_nothing():
    body = score_body([7, 8, 1], 2, rid="r")
    assert body["token_ids_logprob"] == [2] and body["return_logprob"] is True
    assert body["sampling_params"] == {"temperature": 1.0, "max_new_tokens": 0}


@pytest.mark.parametrize(
    ("ids", "reason", "ended", "scored"),
    [
        ([7, 8, 1], "stop", "stop", True),
        ([7, 8, 4], "stop", "stop", True),  # the other EOS id
        ([7, 8, 9], "stop", "stop", False),  # a stop string, or an EOS that this run does not stop at
        ([7, 8, 9, 9, 9, 9], "length", "length", False),
        ([7, 8, 9, 9, 9, 1], "stop", "stop", True),  # at the very last position
        ([7, 8], "abort", "abort", False),
        ([], "abort", "abort", False),
        # An abort that came behind the last token hides how the response ended: it is not to be continued.
        ([7, 8, 1], "abort", "stop", True),
        ([7, 8, 9, 9, 9, 9], "abort", "length", False),
        ([7, 1, 9], "abort", "abort", False),
    ],
)
def test_only_a_response_that_ended_on_a_stop_token_has_a_score(ids, reason, ended, scored):
    found = joined(None, reply(ids, reason), 3, SAMPLING)
    assert (found.finish_reason, found.is_scored(STOPS)) == (ended, scored)
    assert found.response_ids.tolist() == ids and len(found.logprobs) == len(ids)


def test_a_resumed_response_has_the_tokens_log_probs_and_versions_of_all_its_parts():
    first = joined(None, reply([7, 8], "abort"), 3, SAMPLING)
    second = joined(first, reply([9], "abort"), 4, SAMPLING)
    third = joined(second, reply([5, 1], "stop"), 6, SAMPLING)
    assert third == Generation(
        [7, 8, 9, 5, 1],
        [-0.5] * 5,
        "stop",
        3,
        spans=(WeightSpan(3, 2), WeightSpan(4, 1), WeightSpan(6, 2)),
    )
    assert first.response_ids.tolist() == [7, 8]  # what came before is left as it was


def test_the_length_limit_counts_all_parts():
    first = joined(None, reply([7, 8, 9, 9], "abort"), 3, SAMPLING)
    assert joined(first, reply([5], "abort"), 4, SAMPLING).finish_reason == "abort"
    assert joined(first, reply([5, 5], "abort"), 4, SAMPLING).finish_reason == "length"


def test_weights_under_which_a_request_was_only_queued_do_not_make_it_old():
    queued = joined(None, reply([], "abort"), 3, SAMPLING)
    assert (queued.weight_version, queued.spans) == (3, (WeightSpan(3, 0),))
    again = joined(queued, reply([7, 1], "stop"), 5, SAMPLING)
    assert (again.weight_version, again.spans) == (5, (WeightSpan(5, 2),))
    sampled = joined(joined(None, reply([7], "abort"), 3, SAMPLING), reply([], "abort"), 4, SAMPLING)
    assert (sampled.weight_version, sampled.spans) == (3, (WeightSpan(3, 1),))


# what is counted and repeated


def test_request_stats_are_told_as_shares_and_counted_anew():
    stats = RequestStats(requests=8, retries=2, stale_replies=1, prompt_tokens=100, cached_tokens=75)
    plain = stats.metrics()
    assert plain == {
        "rollout/requests": 8.0,
        "rollout/retries": 2.0,
        "rollout/stale_replies": 1.0,
        "rollout/prefix_cached_fraction": 0.75,
        "servers/cache_hit_rate": 0.75,
    }
    stats.generate_seconds, stats.scores, stats.score_seconds = 9.0, 4, 1.0
    stats.score_tokens, stats.score_cached_tokens = 120, 116
    assert stats.take() == plain | {
        "rollout/score_cached_fraction": 116 / 120,
        "rollout/score_uncached_tokens": 1.0,
        "rollout/score_time_fraction": 0.1,
        "servers/cache_hit_rate": (75 + 116) / (100 + 120),
    }
    assert stats == RequestStats() and stats.metrics()["rollout/prefix_cached_fraction"] == 0.0


def attempts(*outcomes):
    """A function that does what `outcomes` say, one after the other, and its calls."""
    left, calls = list(outcomes), []

    async def attempt():
        calls.append(time.monotonic())
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return attempt, calls


FAULT = ServerFault("http://s", "generation", "500")


def test_a_fault_is_repeated_until_it_is_gone_and_each_time_is_noted():
    attempt, calls = attempts(FAULT, FAULT, "done")
    noted = []
    assert asyncio.run(retried(attempt, noted.append)) == "done"
    assert len(calls) == 3 and noted == [FAULT, FAULT]


@pytest.mark.parametrize(
    "error", [ServerRefused("http://s", "generation", "400"), ServersLost("none"), ValueError("ours")]
)
def test_what_would_only_repeat_itself_is_not_repeated(error):
    attempt, calls = attempts(error)
    with pytest.raises(type(error)):
        asyncio.run(retried(attempt, lambda error: None))
    assert len(calls) == 1


def test_whoever_waits_ends_it():
    attempt, calls = attempts(FAULT)

    async def wait():
        await asyncio.wait_for(retried(attempt, lambda error: None), 0.5)

    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    assert len(calls) >= 2
