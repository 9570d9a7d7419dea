"""`rollout.function`: what samples are made of, and how a function is found and checked before a run."""

import asyncio

import numpy as np
import pytest
from helpers.sample_functions import PROMPT, SAMPLING, STOP, write
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import ConfigError, load_config
from megatron_laser.rollout.function import Conversation, FunctionSample, InvalidSample, Turn
from megatron_laser.rollout.function.conversation import as_generation
from megatron_laser.rollout.function.loading import FunctionSpecError, function_findings, load_function
from megatron_laser.types import Generation, WeightSpan

CALL, ANSWER = 3, 5


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
