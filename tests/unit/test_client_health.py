"""The health of one server as a pure state machine, and which of its answers count as answers."""

import numpy as np
import pytest

from megatron_laser.rollout.client.health import (
    Answered,
    DrainBegan,
    Health,
    Limits,
    Missed,
    RequestFailed,
    Restarted,
    State,
    UpdateBegan,
    UpdateDone,
    UpdateFailed,
)
from megatron_laser.rollout.client.identify import Expected, mismatches
from megatron_laser.rollout.sglang_api import (
    WireError,
    parse_generate,
    parse_score,
    parse_version,
    server_facts,
)

LIMITS = Limits(start=100.0, update=60.0, silence=30.0)


def walk(*events, health=None, every=1.0):
    health = health or Health.fresh(0.0)
    now = health.last_alive
    for event in events:
        now += every
        health = health.after(event, now, LIMITS)
    return health


def test_silence_is_normal_while_a_server_starts_and_ends_at_the_deadline():
    assert walk(*[Missed("no")] * 90).state is State.STARTING
    assert walk(*[Missed("no", refused=True)] * 101).state is State.DEAD


def test_a_failed_request_makes_it_suspect_until_a_probe_is_answered():
    health = walk(Answered("a"), RequestFailed("reset", gone=True))
    assert health.state is State.SUSPECT and not health.takes_work("a")
    assert walk(Answered("a"), health=health).takes_work("a")


def test_a_long_prefill_is_tolerated_and_a_hang_is_not():
    health = walk(Answered("a"), *[Missed("slow")] * 29)
    assert health.state is State.SUSPECT
    assert walk(*[Missed("slow")] * 3, health=health, every=30.0).state is State.DEAD


def test_a_port_that_nobody_listens_on_is_death_after_three_probes():
    assert walk(Answered("a"), *[Missed("refused", refused=True)] * 2).state is State.SUSPECT
    assert walk(Answered("a"), *[Missed("refused", refused=True)] * 3).state is State.DEAD


def test_a_server_that_came_back_takes_no_work_before_it_holds_the_wanted_weights():
    health = walk(Answered("run-3"), Restarted(), Answered("default"))
    assert health.state is State.HEALTHY and health.can_be_updated()
    assert not health.takes_work("run-3")
    assert walk(UpdateBegan(), UpdateDone("run-3"), health=health).takes_work("run-3")


def test_a_failed_update_is_not_forgiven_because_the_server_names_the_right_version():
    health = walk(Answered("run-1"), UpdateBegan(), UpdateFailed("checksums"), Answered("run-2"))
    assert health.state is State.HEALTHY and not health.takes_work("run-2")
    assert walk(UpdateBegan(), UpdateDone("run-2"), health=health).takes_work("run-2")


def test_silence_is_normal_during_an_update_and_death_after_its_deadline():
    health = walk(Answered("a"), UpdateBegan(), Missed("busy"), Missed("busy"))
    assert health.state is State.UPDATING
    assert walk(Missed("busy"), health=health, every=61.0).state is State.DEAD


def test_a_draining_server_takes_nothing_new_but_can_be_updated():
    health = walk(Answered("a"), DrainBegan(), Answered("a"))
    assert health.state is State.DRAINING and not health.takes_work("a") and health.can_be_updated()


def reply(**changes):
    meta = {
        "finish_reason": {"type": "stop", "matched": 1},
        "output_token_logprobs": [[-0.5, 7, None], [-0.1, 1, None]],
        "weight_version": "run-1",
        "prompt_tokens": 3,
        "cached_tokens": 2,
    }
    return {"output_ids": [7, 1], "meta_info": meta | changes}


def test_a_whole_answer_is_taken_as_it_is():
    parsed = parse_generate(reply(), 28, max_new_tokens=8, prompt_tokens=3)
    assert (parsed.ids.tolist(), parsed.finish_reason) == ([7, 1], "stop")
    assert parsed.logprobs.tolist() == [-0.5, np.float32(-0.1)]
    assert (parsed.version, parsed.cached_tokens) == ("run-1", 2)


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"output_ids": [7, 1]},
        reply(finish_reason={"type": "nonsense"}),
        reply(output_token_logprobs=[[-0.5, 7, None]]),
        reply(output_token_logprobs=[[-0.5, 8, None], [-0.1, 1, None]]),
        reply(output_token_logprobs=[[float("nan"), 7, None], [-0.1, 1, None]]),
        reply(weight_version=None),
        reply() | {"output_ids": [99, 1]},
        reply(completion_tokens=3),
        reply(prompt_tokens=4),
        reply(output_token_logprobs=[[-0.5, 7, None]] * 9) | {"output_ids": [7] * 9},
        reply(output_token_logprobs=[]) | {"output_ids": []},
    ],
)
def test_half_an_answer_is_none(body):
    with pytest.raises(WireError):
        parse_generate(body, 28, max_new_tokens=8, prompt_tokens=3)


def test_the_score_is_that_of_the_asked_token():
    body = reply(output_token_ids_logprobs=[[[-7.5, 2, None]]])
    assert parse_score(body, 2, prompt_tokens=3).logprobs == (-7.5,)
    for wrong in (reply(), reply(output_token_ids_logprobs=[[[-7.5, 3, None]]])):
        with pytest.raises(WireError):
            parse_score(wrong, 2, prompt_tokens=3)


def test_a_server_that_does_not_fit_is_named_with_what_differs():
    expected = Expected(28, model_type="qwen2", dtype="float32", longest=64)
    info = {"model_type": "qwen2", "is_generation": True, "model_path": "m"}
    fits = {"version": "0.5.23", "dtype": "float32", "max_req_input_len": 64}
    assert mismatches(server_facts(info, fits), expected) == []
    assert "0.5.23 or newer" in mismatches(server_facts(info, fits | {"version": "0.5.9"}), expected)[0]
    assert "is a qwen2" in mismatches(server_facts(info | {"model_type": "llama"}, fits), expected)[0]
    assert "--dtype float32" in mismatches(server_facts(info, fits | {"dtype": "bfloat16"}), expected)[0]
    assert "takes 58 tokens" in mismatches(server_facts(info, fits | {"max_req_input_len": 58}), expected)[0]
    assert parse_version("0.5.23rc1") == (0, 5, 23) and parse_version("?") == ()
