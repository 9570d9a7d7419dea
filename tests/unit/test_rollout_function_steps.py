"""A `rollout.function` in a training step, and over servers."""

import json
import time
from concurrent.futures import Future

import pytest
from helpers.collecting import PROMPTS
from helpers.faulty_server import VOCABULARY, FaultyServer, open_engine
from helpers.sample_functions import STOP, CountingEngine, made_functions, samples

from megatron_laser.data import PromptCursor
from megatron_laser.observability.timers import Timers
from megatron_laser.rewards import Grade
from megatron_laser.rollout.ahead import RolloutAhead
from megatron_laser.rollout.collector import RolloutCollector
from megatron_laser.rollout.function.runner import FunctionFailed
from megatron_laser.types import Prompt, SamplingParams


@pytest.fixture
def functions(tmp_path):
    with made_functions(tmp_path) as make:
        yield make


# --- in a step


class Grader:
    last_trouble = ""

    def submit(self, text, answer, facts=None):
        future = Future()
        future.set_result(Grade(float(len(text) % 2), "correct" if len(text) % 2 else "wrong"))
        return future


def collector_of(function, engine, **settings):
    return RolloutCollector(
        engine,
        Grader(),
        PROMPTS,
        PromptCursor(len(PROMPTS), 5, False),
        sampling=SamplingParams(2, 8, (STOP,)),
        prompts_per_step=3,
        decode=lambda ids: " ".join(map(str, ids)),
        deadline=60.0,
        seed=3,
        timers=Timers(),
        function=function,
        **settings,
    )


SOME_FAIL = """
from megatron_laser.rollout.function import Conversation

async def f(engine, prompt, sampling, *, bad):
    talk = Conversation(prompt, sampling)
    talk.sampled(await engine.generate([*talk.ids], max_new_tokens=2))
    if prompt.row in bad:
        raise ValueError(f"row {prompt.row}")
    talk.environment([5])
    return talk
"""


def test_samples_that_fail_are_left_out_and_counted(functions):
    engine = CountingEngine()
    engine.version = 0
    function = functions(SOME_FAIL, engine, options={"bad": [1]}, vocab_size=200)
    batch = collector_of(function, engine).collect(1)
    assert [group.prompt.row for group in batch.groups] == [0, 2, 1]  # those without a sample are last
    assert [(len(group.samples), len(group.ungraded)) for group in batch.groups] == [(2, 0), (2, 0), (0, 2)]
    counts = {name: batch.metrics[name] for name in batch.metrics if name.startswith("function_failed")}
    assert counts == {"function_failed_timeout": 0, "function_failed_error": 2, "function_failed_invalid": 0}
    assert batch.metrics["grading_failed"] == 0
    assert {sample.outcome for sample in batch.groups[2].ungraded} == {"function_error"}


def test_a_step_without_any_sample_stops_the_run_with_the_cause(functions):
    engine = CountingEngine()
    engine.version = 0
    function = functions(SOME_FAIL, engine, options={"bad": list(range(40))}, vocab_size=200)
    with pytest.raises(
        FunctionFailed, match=r"6 function_error; the last one: error: ValueError: row \d \(.*in f\)"
    ):
        collector_of(function, engine).collect(1)


def test_a_batch_that_is_ahead_goes_through_a_checkpoint_with_its_masks_and_failures(functions):
    engine = CountingEngine()
    engine.version = 0
    function = functions(SOME_FAIL, engine, options={"bad": [4]}, vocab_size=200)
    ahead = RolloutAhead(collector_of(function, engine, ahead=1), PROMPTS)
    ahead.collect(1)
    ahead.begin(2)  # beside the training of step 1, from the weights before it
    ahead.wait(20.0)
    state = json.loads(json.dumps(ahead.state()))
    engine.version = 1
    batch = ahead.collect(2)
    assert batch.metrics["function_failed_error"] == 2 and batch.weight_version == 0
    resumed = RolloutAhead(collector_of(function, engine, ahead=1), PROMPTS)
    resumed.load_state(state)
    again = resumed.collect(2)
    assert again.groups[:2] == batch.groups[:2]  # generations compare by their masks, too
    assert [sample.outcome for sample in again.groups[2].ungraded] == ["function_error"] * 2
    assert all(sample.generation.sampled.tolist() == [True, False] for sample in again.samples())
    assert [len(group.ungraded) for group in again.groups] == [0, 0, 2]


# --- over servers

TALK = """
from megatron_laser.rollout.function import Conversation

async def f(engine, prompt, sampling):
    talk = Conversation(prompt, sampling)
    talk.sampled(await engine.generate(talk.ids))
    talk.environment([5, 6])
    talk.sampled(await engine.generate(talk.ids))
    return talk
"""


@pytest.fixture
def servers():
    """Two, and an engine over them."""
    made = [FaultyServer(), FaultyServer()]
    engine = open_engine(*made)
    yield made, engine
    engine.close()
    for server in made:
        server.stop()


def test_turns_go_to_servers_one_by_one_and_are_repeated_when_one_fails(functions, servers):
    (first, second), engine = servers
    first.faults.extend(["500", "reset"])
    second.faults.extend([None, "truncated JSON"])
    function = functions(TALK, engine, vocab_size=VOCABULARY)
    sampling = SamplingParams(4, 12, (STOP,), seed=7, score_token_id=2)
    found = samples(function, [Prompt(0, "", "", [4, 5]), Prompt(1, "", "", [4, 6])], sampling)
    assert len(found) == 8
    for generation in found.values():
        assert generation.response_ids.tolist() == [7, 8, 9, STOP, 5, 6, STOP]
        assert generation.sampled.tolist() == [True] * 4 + [False] * 2 + [True]
        assert generation.logprobs[generation.sampled].tolist() == [-0.5] * 5
        assert generation.zc_logprob == -7.5 and generation.weight_version == 0
    asked = [*first.generations, *second.generations]
    assert len(asked) == 16 + 3
    # Each turn of each sample has a seed of its own; a repeated request has its own again.
    seeds = {body["sampling_params"]["sampling_seed"] for body in asked}
    assert len(seeds) == 16
    assert engine.take_metrics()["rollout/retries"] == 3.0


def test_a_sample_that_is_given_up_ends_its_request_on_the_server(functions, servers):
    (first, second), engine = servers
    for server in (first, second):
        server.holds = lambda body: 9 in body["input_ids"]  # the second turn
    function = functions(TALK, engine, vocab_size=VOCABULARY, deadline=1.0)
    found = samples(function, [Prompt(0, "", "", [4, 5])])
    assert found == {(0, 0): "timeout", (0, 1): "timeout"}
    ends = time.monotonic() + 10.0
    while len(first.aborted) + len(second.aborted) < 2 and time.monotonic() < ends:
        time.sleep(0.02)
    held = {body["rid"] for server in (first, second) for body in server.requests if 9 in body["input_ids"]}
    assert {*first.aborted, *second.aborted} == held and len(held) == 2
    assert all(member.health.deaths == 0 for member in engine.fleet.members)
    assert len(engine.fleet.available()) == 2  # it was the function's time that was up, not a server's fault
