"""`rollout.function`: found and checked before a run, bounded in time, counted when it fails, over any engine."""

import asyncio
import json
import logging
import textwrap
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
from helpers.collecting import PROMPTS
from helpers.faulty_server import VOCABULARY, FaultyServer, open_engine
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import ConfigError, load_config
from megatron_laser.data import PromptCursor
from megatron_laser.observability.timers import Timers
from megatron_laser.rewards import Grade
from megatron_laser.rollout.ahead import RolloutAhead
from megatron_laser.rollout.client.errors import WeightsNeeded
from megatron_laser.rollout.collector import RolloutCollector
from megatron_laser.rollout.engine import StopEarly, StoppedEarly
from megatron_laser.rollout.function import Conversation, FunctionSample, InvalidSample, Turn, runner
from megatron_laser.rollout.function.as_engine import FunctionAsEngine
from megatron_laser.rollout.function.conversation import as_generation
from megatron_laser.rollout.function.loading import FunctionSpecError, function_findings, load_function
from megatron_laser.rollout.function.runner import FunctionFailed, SampleFunction
from megatron_laser.types import Generation, Prompt, SamplingParams, WeightSpan

STOP, CALL, ANSWER = 1, 3, 5
SAMPLING = SamplingParams(2, 8, (STOP,))
PROMPT = Prompt(3, "two and two", "4", [10, 11])


def turn(ids, behind=(10, 11), version=4):
    return Turn(tuple(behind), tuple(ids), np.full(len(ids), -0.5, np.float32), "stop", version)


# --- what a sample is made of


def test_a_conversation_keeps_tokens_mask_log_probs_and_versions_in_step():
    talk = Conversation(PROMPT, SAMPLING)
    talk.sampled(turn([7, CALL, 8], version=4), keep=2)
    talk.environment([ANSWER])
    assert talk.ids == [10, 11, 7, CALL, ANSWER] and talk.tokens_left == 5
    talk.sampled(turn([9], talk.ids, version=4))
    talk.sampled(turn([STOP], talk.ids, version=5))
    found = as_generation(talk, SAMPLING, vocab_size=20, weight_version=5)
    assert found.response_ids.tolist() == [7, CALL, ANSWER, 9, STOP]
    assert found.sampled.tolist() == [True, True, False, True, True]
    assert found.logprobs.tolist() == [-0.5, -0.5, 0.0, -0.5, -0.5]
    assert found.spans == (WeightSpan(4, 3), WeightSpan(5, 1)) and found.weight_version == 4
    assert found.finish_reason == "stop" and found.is_scored((STOP,))


def test_a_sample_that_the_environment_ends_has_no_score():
    talk = Conversation(PROMPT, SAMPLING)
    talk.sampled(turn([7]))
    talk.environment([STOP])
    found = as_generation(talk, SAMPLING, vocab_size=20, weight_version=4)
    assert found.finish_reason == "length" and not found.is_scored((STOP,))
    assert found.text_ids == [7, STOP]


def test_a_conversation_refuses_what_would_not_be_true():
    talk = Conversation(PROMPT, SAMPLING)
    with pytest.raises(InvalidSample, match="sampled behind 3 other tokens"):
        talk.sampled(turn([7], [10, 11, 12]))
    with pytest.raises(InvalidSample, match="keep=2: the turn has 1 tokens"):
        talk.sampled(turn([7]), keep=2)
    with pytest.raises(
        InvalidSample, match=r"9 more tokens make the response 9 long.*rollout.max_new_tokens 8"
    ):
        talk.environment([5] * 9)
    assert talk.response_ids == []


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ("text", "returned str; expected a Conversation"),
        (None, "returned NoneType"),
        (FunctionSample([7, 8], [True], [-0.5, -0.5]), r"2 ids with a mask of \(1,\)"),
        (FunctionSample([7, 8], [True, True], [-0.5]), r"log-probs of \(1,\)"),
        (
            FunctionSample([7] * 9, [True] * 9, [-0.5] * 9),
            "9 tokens; expected at most rollout.max_new_tokens 8",
        ),
        (FunctionSample([7, 20], [True, False], [-0.5, 0.0]), "token id 20 at 1; expected 0 to 19"),
        (FunctionSample([7, -1], [True, True], [-0.5, 0.0]), "token id -1"),
        (FunctionSample([7, 8.5], [True, True], [-0.5, 0.0]), r"entry \d is .*, expected a token id"),
        (FunctionSample([7, "8"], [True, True], [-0.5, 0.0]), r"entry 1 is '8', expected a token id"),
        (FunctionSample([7, 8], [False, False], [0.0, 0.0]), "sampled no token"),
        (FunctionSample([], [], []), "sampled no token"),
        (FunctionSample([7], [True], [float("nan")]), "not finite"),
        (FunctionSample([7, 8], [True, True], [-0.5, -0.5], [(3, 1)]), "names 1 tokens; 2 were sampled"),
    ],
    ids=str,
)
def test_impossible_samples_are_refused(sample, why):
    with pytest.raises(InvalidSample, match=why):
        as_generation(sample, SAMPLING, vocab_size=20, weight_version=0)


def test_a_sample_that_the_policy_made_alone_is_as_without_a_function():
    sample = FunctionSample([7, STOP], [True, True], [-0.5, -0.25])
    found = as_generation(sample, SAMPLING, vocab_size=20, weight_version=2)
    plain = Generation([7, STOP], [-0.5, -0.25], "stop", 2, spans=(WeightSpan(2, 2),))
    assert found.sampled is None and found == plain


# --- found and checked before anything is started


def write(folder, code, name="env.py"):
    path = folder / name
    path.write_text(textwrap.dedent(code))
    return path


@pytest.mark.parametrize(
    ("code", "name", "options", "why"),
    [
        (None, "f", {}, "there is no file"),
        ("import nothing_of_that_name", "f", {}, "running .*env.py failed: ModuleNotFoundError"),
        ("raise SystemExit(3)", "f", {}, "failed: SystemExit: 3"),
        ("async def g(a, b, c): pass", "f", {}, "has no 'f'; its async functions: g"),
        ("f = 3", "f", {}, "is of type int, not a function"),
        ("def f(engine, prompt, sampling): pass", "f", {}, "is not async .*async def"),
        ("async def f(engine, prompt, sampling): yield 1", "f", {}, "async generator"),
        ("async def f(engine, prompt): pass", "f", {}, "too many positional arguments"),
        (
            "async def f(engine, prompt, sampling): pass",
            "f",
            {"turns": 2},
            "unexpected keyword argument 'turns'",
        ),
        (
            "async def f(engine, prompt, sampling, *, turns): pass",
            "f",
            {},
            "missing a required.* argument: 'turns'",
        ),
    ],
)
def test_what_cannot_be_called_is_refused_at_once(tmp_path, code, name, options, why):
    path = tmp_path / "env.py" if code is None else write(tmp_path, code)
    with pytest.raises(FunctionSpecError, match=why) as raised:
        load_function(f"{path}:{name}", options)
    assert str(raised.value).startswith("rollout.function ")


def test_files_modules_and_callable_objects_are_found_with_what_lies_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    write(tmp_path, "FACTOR = 2", "beside_the_function.py")
    path = write(
        tmp_path,
        """
        from beside_the_function import FACTOR

        class Environment:
            async def __call__(self, engine, prompt, sampling, *, turns=FACTOR):
                return turns

        environment = Environment()
        """,
    )
    function = load_function(f"{path}:environment", {})
    assert asyncio.run(function(None, None, None)) == 2
    with pytest.raises(FunctionSpecError, match="importing 'no_such_module' failed"):
        load_function("no_such_module:f", {})


SETTINGS = """
model: {path: m}
data: {train: t.jsonl}
laser: {score_token: 5, ref_logprob: -23.0}
rollout: {%s}
run: {steps: 1, output_dir: out}
"""


def loaded(folder, rollout, *overrides):
    file = folder / "run.yaml"
    file.write_text(SETTINGS % rollout)
    return load_config(file, overrides)


def test_a_relative_file_lies_beside_the_yaml_and_options_can_be_overridden(tmp_path):
    config = loaded(tmp_path, "function: envs/env.py:f, function_options: {turns: 2, tool: add}")
    assert config.rollout.function == f"{tmp_path}/envs/env.py:f"
    config = loaded(
        tmp_path,
        "function: package.env:f, function_options: {turns: 2, tool: add}",
        "rollout.function_options.turns=3",
    )
    assert config.rollout.function == "package.env:f"
    assert config.rollout.function_options == {"turns": 3, "tool": "add"}


@pytest.mark.parametrize(
    ("rollout", "why"),
    [
        ("function: f", "expected 'path/to/file.py:function' or"),
        ("function_options: {turns: 2}", "without rollout.function"),
        ("function: 'e.py:f', function_deadline: 90, deadline: 60", "90 is longer than rollout.deadline 60"),
        (
            "function: 'e.py:f', engine: sglang, oversample: 1.5",
            "rollout.function with rollout.oversample: 1.5",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, rollout, why):
    with pytest.raises(ConfigError, match=why):
        loaded(tmp_path, rollout)


def test_check_and_the_dry_run_say_what_is_wrong_with_it(tmp_path):
    write(tmp_path, "async def f(engine, prompt, sampling, *, turns): pass")
    write(tmp_path, "def f(engine, prompt, sampling): pass", "plain.py")
    (tmp_path / "run.yaml").write_text(SETTINGS % "function: 'plain.py:f'")
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--dry-run"])
    assert done.exit_code == 2 and "is not async" in done.output
    for rollout, level, text in [
        ("function: 'env.py:f'", "error", "missing a required"),
        ("function: 'env.py:f', function_options: {turns: 2}", "ok", "async, takes"),
    ]:
        (finding,) = function_findings(loaded(tmp_path, rollout))
        assert finding.level == level and text in finding.text
    assert function_findings(loaded(tmp_path, "")) == []


# --- running


class CountingEngine:
    """Blocks for each call, like the in-process engine. A response counts on from its last id, and ends in STOP behind
    16; a call is answered within `seconds`."""

    def __init__(self):
        self.version = 4
        self.calls = []  # (prompts, limit, stop ids, seed) of each
        self.error = None
        self.entered = threading.Event()

    def generate(self, prompts, sampling, *, deadline, on_finished=None, stop=None):
        assert sampling.samples_per_prompt == 1 and sampling.score_token_id is None
        self.calls.append((list(prompts), sampling.max_new_tokens, sampling.stop_token_ids, sampling.seed))
        self.entered.set()
        if self.error is not None:
            raise self.error
        return [[self._one(ids, sampling)] for ids in prompts]

    def _one(self, ids, sampling):
        made = []
        while len(made) < sampling.max_new_tokens:
            made.append(ids[-1] + len(made) + 1 if ids[-1] + len(made) < 16 else STOP)
            if made[-1] in sampling.stop_token_ids:
                return Generation(made, [-0.5] * len(made), "stop", self.version)
        return Generation(made, [-0.5] * len(made), "length", self.version)

    def score(self, sequences, token_id, *, deadline):
        return [-float(len(ids)) for ids in sequences]


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


@pytest.fixture
def functions(tmp_path):
    """Makes functions of code; closes them."""
    made = []

    def make(code, engine=None, *, deadline=20.0, options=None, **settings):
        path = write(tmp_path, code, f"env_{len(made)}.py")
        defaults = dict(tokenizer=Words(), vocab_size=28, longest=40, max_positions=64, score_token_id=2)
        made.append(
            SampleFunction(
                f"{path}:f",
                engine or CountingEngine(),
                options=options or {},
                deadline=deadline,
                **defaults | settings,
            )
        )
        return made[-1]

    yield make
    for function in made:
        function.close()


def samples(function, prompts=(PROMPT,), sampling=SAMPLING, *, deadline=30.0, skip=(), stop=None):
    """(prompt, sample) -> what it came to."""
    found = {}
    function.generate(
        list(prompts),
        sampling,
        deadline=deadline,
        on_finished=lambda p, s, generation: found.update({(p, s): generation}),
        on_failed=lambda p, s, kind: found.update({(p, s): kind}),
        skip=skip,
        stop=stop,
    )
    return found


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


# --- in a step


class Grader:
    last_trouble = ""

    def submit(self, text, answer):
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
