"""A `rollout.function` that runs: what it asks of the engine, bounded in time, and how it fails."""

import logging
import threading
import time

import pytest
from helpers.sample_functions import PROMPT, SAMPLING, STOP, CountingEngine, made_functions, samples

from megatron_laser.rollout.client.errors import WeightsNeeded
from megatron_laser.rollout.engine import StopEarly, StoppedEarly
from megatron_laser.rollout.function import runner
from megatron_laser.rollout.function.as_engine import FunctionAsEngine
from megatron_laser.rollout.function.runner import FunctionFailed
from megatron_laser.types import Prompt, SamplingParams


@pytest.fixture
def functions(tmp_path):
    with made_functions(tmp_path) as make:
        yield make


TOOL = """
import asyncio
from megatron_laser.rollout.function import Conversation

async def f(engine, prompt, sampling, *, turns=2):
    talk = Conversation(prompt, sampling)
    for _ in range(turns):
        talk.sampled(await engine.generate(talk.ids, max_new_tokens=2))
        talk.environment(engine.encode("14"))
    talk.sampled(await engine.generate(talk.ids))
    return talk
"""


def test_what_waits_at_the_same_moment_is_one_call_of_the_engine(functions):
    engine = CountingEngine()
    prompts = [PROMPT, Prompt(4, "", "", [12, 13, 2])]
    found = samples(functions(TOOL, engine), prompts)
    assert [len(calls) for calls, *_ in engine.calls] == [4, 4, 4]
    assert engine.calls[0][:3] == ([[10, 11], [10, 11], [12, 13, 2], [12, 13, 2]], 2, (STOP,))
    first = found[0, 0]
    assert first.response_ids.tolist() == [12, 13, 14, 15, 16, 14, 15, 16]  # cut at rollout.max_new_tokens
    assert first.sampled.tolist() == [True, True, False, True, True, False, True, True]
    assert found[1, 0].response_ids.tolist() == [3, 4, 14, 15, 16, 14, 15, 16]
    assert len({seed for *_, seed in engine.calls}) == 3  # a stream of its own for each call


def test_equal_seeds_ask_the_engine_the_same_things(functions):
    calls = []
    for _ in range(2):
        engine = CountingEngine()
        samples(functions(TOOL, engine), [PROMPT] * 3, SamplingParams(4, 8, (STOP,), seed=9))
        calls.append(engine.calls)
    assert calls[0] == calls[1]


def test_each_request_ends_at_its_own_limit_and_stop_tokens_make_calls_of_their_own(functions):
    engine = CountingEngine()
    code = """
    from megatron_laser.rollout.function import Conversation

    async def f(engine, prompt, sampling):
        talk = Conversation(prompt, sampling)
        more = (13,) if prompt.row == 5 else ()
        talk.sampled(await engine.generate(talk.ids, max_new_tokens=prompt.row, stop_token_ids=more))
        return talk
    """
    found = samples(functions(code, engine), [Prompt(row, "", "", [10]) for row in (2, 4, 5)])
    assert [found[p, 0].response_ids.tolist() for p in range(3)] == [[11, 12], [11, 12, 13, 14], [11, 12, 13]]
    assert [(len(prompts), limit, stops) for prompts, limit, stops, _ in engine.calls] == [
        (4, 4, (STOP,)),
        (2, 5, (STOP, 13)),
    ]


def test_who_waits_for_a_tool_does_not_hold_up_the_others(functions):
    code = """
    import asyncio
    from megatron_laser.rollout.function import Conversation

    async def f(engine, prompt, sampling):
        talk = Conversation(prompt, sampling)
        if prompt.row == 1:
            await asyncio.sleep(1.0)
        talk.sampled(await engine.generate(talk.ids))
        return talk
    """
    engine = CountingEngine()
    found = samples(functions(code, engine), [Prompt(row, "", "", [10]) for row in range(3)])
    assert len(found) == 6
    assert [len(prompts) for prompts, *_ in engine.calls] == [4, 2]


MIXED = """
import asyncio
from megatron_laser.rollout.function import Conversation

async def f(engine, prompt, sampling):
    talk = Conversation(prompt, sampling)
    talk.sampled(await engine.generate(talk.ids, max_new_tokens=2))
    match prompt.row:
        case 100:
            raise KeyError("the tool is not there")
        case 101:
            await asyncio.sleep(60)
        case 102:
            while True:  # does not let itself be cancelled
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass
        case 103:
            talk.environment([99])
        case 104:
            raise SystemExit(1)
        case 105:
            await engine.generate([10, 99])
        case 106:
            raise asyncio.CancelledError
        case 107:
            prompt.token_ids.clear()  # its own copy
        case 108:
            raise TimeoutError("of the tool's own")
    return talk
"""
KINDS = ["error", "timeout", "timeout", "invalid", "error", "invalid", "error", None, "error", None]


def test_failures_are_of_a_kind_and_end_nothing_else(functions, caplog, monkeypatch):
    monkeypatch.setattr(runner, "_LEAVE_SECONDS", 0.1)
    prompts = [Prompt(100 + number, "", "", [10]) for number in range(len(KINDS))]
    function = functions(MIXED, deadline=1.0)
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        found = samples(function, prompts)
    assert time.monotonic() - began < 8.0
    kinds = [found[p, 0] if isinstance(found[p, 0], str) else None for p in range(len(KINDS))]
    assert kinds == KINDS
    assert found[9, 1].response_ids.tolist() == [11, 12] and prompts[7].token_ids == [10]
    said = [record.message for record in caplog.records if "rollout.function" in record.message]
    assert len(said) == 3, said  # the first of each kind
    error = next(line for line in said if "error: KeyError: 'the tool is not there'" in line)
    assert "env_0.py:10 in f" in error and "function_failed_error counts them (said once)" in error


def test_a_function_that_blocks_all_others_is_found(functions, monkeypatch):
    monkeypatch.setattr(runner, "_BLOCKED_SLACK", 0.2)
    monkeypatch.setattr(runner, "_LEAVE_SECONDS", 0.5)
    code = """
    import time

    async def f(engine, prompt, sampling):
        time.sleep(1.5)
    """
    with pytest.raises(
        FunctionFailed, match=r"has blocked all samples for 1 s \(.*env_0.py:5 in f\).*to_thread"
    ):
        samples(functions(code, deadline=0.5))


def test_the_rollout_has_a_deadline_of_its_own(functions):
    code = "import asyncio\nasync def f(engine, prompt, sampling): await asyncio.sleep(60)"
    with pytest.raises(TimeoutError, match=r"not done within rollout.deadline"):
        samples(functions(code, deadline=30.0), deadline=0.5)


def test_an_evaluation_can_be_stopped(functions):
    code = "import asyncio\nasync def f(engine, prompt, sampling): await asyncio.sleep(60)"
    stop = StopEarly()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(StoppedEarly):
        samples(functions(code), stop=stop)


STUBBORN = """
from megatron_laser.rollout.function import Conversation

async def f(engine, prompt, sampling):
    talk = Conversation(prompt, sampling)
    try:
        talk.sampled(await engine.generate(talk.ids))
    except Exception:
        talk.environment([5])
    return talk
"""


def test_what_the_engine_raises_ends_the_rollout_whatever_the_function_does_with_it(functions):
    engine = CountingEngine()
    function = functions(STUBBORN, engine)
    engine.error = WeightsNeeded("servers came back")
    with pytest.raises(WeightsNeeded, match="servers came back"):
        samples(function)
    engine.error = None
    assert set(samples(function, skip={(0, 0)})) == {(0, 1)}  # a further call makes what is missing


def test_a_score_is_read_behind_an_ended_response_where_the_engine_scores(functions):
    sampling = SamplingParams(1, 8, (STOP,), score_token_id=2)
    found = samples(functions(STUBBORN), [PROMPT, Prompt(1, "", "", [2])], sampling)
    assert found[0, 0].response_ids.tolist() == [12, 13, 14, 15, 16, STOP]
    assert found[0, 0].zc_logprob == -8.0  # of prompt and response
    assert found[1, 0].finish_reason == "length" and found[1, 0].zc_logprob is None


def test_the_handle_scores_and_says_what_is_left(functions):
    code = """
    from megatron_laser.rollout.function import FunctionSample

    async def f(engine, prompt, sampling):
        assert engine.tokens_left(prompt.token_ids) == 8
        assert engine.tokens_left([10, 11, 5]) == 7
        assert engine.tokens_left([20] * 30) == 10  # another text: up to the longest sequence
        assert 0 < engine.seconds_left <= 20
        assert (prompt.problem, prompt.answer, prompt.row) == ("two and two", "4", 3)
        assert engine.decode([5, 6]) == "5 6" and engine.stop_token_ids == (1,)
        turn = await engine.generate([10, 11, 5, 5, 5, 5, 5, 5, 5], max_new_tokens=50)
        assert len(turn.ids) == 1
        score = await engine.score([10, 11, 1])
        return FunctionSample([7], [True], [score])
    """
    found = samples(functions(code))
    assert found[0, 0].logprobs.tolist() == [-3.0], found


def test_an_evaluation_gets_an_empty_response_for_a_sample_that_failed(functions):
    engine = CountingEngine()
    prompts = [Prompt(row, "", "", [10, row - 98]) for row in (100, 109)]
    as_engine = FunctionAsEngine(functions(MIXED, engine), engine, prompts)
    heard = []
    found = as_engine.generate(
        [[10, 11], [10, 2]], SAMPLING, deadline=20.0, on_finished=lambda *args: heard.append(args[:2])
    )
    lengths = [[len(generation.response_ids) for generation in group] for group in found]
    assert lengths == [[2, 2], [0, 0]]
    assert sorted(heard) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert as_engine.score([[1, 2]], 2, deadline=1.0) == [-2.0]
