"""Whole runs with a `rollout.function` in this process: a tool's tokens are in the text, and not in what is learned."""

import json
import textwrap

import pytest
from helpers.tiny_run import metrics_without_times, write_tiny_run

from megatron_laser.model import platform

platform.install()

from helpers.whole_runs import run  # noqa: E402

pytestmark = pytest.mark.slow

#: The policy is stopped at a `+`, or after three tokens; a tool then writes 19 twice.
COUNTER = """
from megatron_laser.rollout.function import Conversation

async def counter(engine, prompt, sampling, *, turns, fails=()):
    talk = Conversation(prompt, sampling)
    for _ in range(turns):
        turn = await engine.generate(talk.ids, max_new_tokens=3, stop_token_ids=engine.encode("+"))
        talk.sampled(turn)
        if turn.ids[-1] in engine.stop_token_ids or talk.tokens_left < 2:
            break
        talk.environment(engine.encode("19 19"))
    if prompt.row in fails:
        raise LookupError("the tool knows nothing of this problem")
    return talk
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout_function")
    (folder / "env.py").write_text(textwrap.dedent(COUNTER))
    return write_tiny_run(
        folder,
        rollout={"function": "env.py:counter", "function_options": {"turns": 2}},
        data={"validation": "train.jsonl"},
        evaluation={"every": 3, "max_prompts": 4},
        logging={"rollouts_every": 1},
        run={"steps": 3},
    )


def test_a_run_trains_on_the_policys_own_tokens(run_file, tmp_path):
    folder = run(run_file, tmp_path / "out", "checkpoint.every=100")
    lines = metrics_without_times(folder)
    steps = [line for line in lines if "policy_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["logprob_diff_max"] < 1e-5  # of sampled tokens, behind what the tool wrote as well
        assert 0.1 < line["environment_tokens_fraction"] < 0.6
        assert sum(line[f"function_failed_{kind}"] for kind in ("timeout", "error", "invalid")) == 0
        assert line["grad_norm"] > 0
    texts = [
        json.loads(line)["response"]
        for file in sorted((folder / "rollouts").iterdir())
        for line in file.read_text().splitlines()
    ]
    assert len(texts) == 3 * 16 and sum("1919" in text for text in texts) > 30
    # The evaluation's responses are the function's as well.
    (records,) = (folder / "evaluation").glob("validation_step_3.jsonl")
    assert sum("1919" in line for line in records.read_text().splitlines()) >= 2


def test_a_resumed_run_is_the_one_that_was_not_interrupted(run_file, tmp_path):
    once = ("run.steps=4", "evaluation.every=0")
    whole = metrics_without_times(run(run_file, tmp_path / "whole", *once))
    run(run_file, tmp_path / "parts", "run.steps=2", "evaluation.every=0")
    assert metrics_without_times(run(run_file, tmp_path / "parts", *once)) == whole and len(whole) == 4


def test_a_step_without_a_sample_ends_the_run_with_the_cause(run_file, tmp_path):
    everything = list(range(24))
    with pytest.raises(Exception, match=r"not one response .*LookupError: the tool knows nothing"):
        run(run_file, tmp_path / "out", f"rollout.function_options.fails={everything}")
