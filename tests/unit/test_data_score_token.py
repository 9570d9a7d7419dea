"""Data that holds the score token, and ids that the model does not have, are refused before anything is built."""

import json

import pytest
from helpers.models import save_tiny_model, save_word_tokenizer
from helpers.runs import run_config

from megatron_laser.config import ConfigError
from megatron_laser.errors import UserError
from megatron_laser.run.inputs import read_inputs
from megatron_laser.run.preflight import CheckFailed

WORDS = ["<unk>", "<eos>", "what", "is", "1", "2", "+", "<|score|>"]
SCORE = WORDS.index("<|score|>")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    save_word_tokenizer(folder, WORDS)
    # Of type llama: its tokenizer class takes tokenizer.json as it is.
    save_tiny_model(folder, "llama3-rope", vocab_size=len(WORDS))
    return folder


def read(tmp_path, model, *rows, validation=None, score_token="<|score|>", reward="math_verify", **rollout):
    files = {"train": rows, "validation": validation or [("what is 1", "1")]}
    for name, content in files.items():
        lines = [json.dumps({"problem": problem, "answer": answer}) for problem, answer in content]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = {name: str(tmp_path / f"{name}.jsonl") for name in files}
    config = run_config(
        tmp_path,
        model,
        data=data | {"apply_chat_template": False, "prompt_suffix": ""},
        laser={"score_token": score_token},
        rollout=rollout,
        reward={"function": reward},
    )
    inputs = read_inputs(config)
    inputs.folder.release()
    return inputs


GOOD = ("what is 1 + 1", "2")


def test_data_without_the_score_token_is_read(tmp_path, model):
    inputs = read(tmp_path, model, GOOD, ("what is 2", "2"))
    assert inputs.score_token_id == SCORE and len(inputs.train) == 2


def test_a_prompt_with_the_score_token_is_refused_by_its_row(tmp_path, model):
    with pytest.raises(
        CheckFailed,
        match=r"answers of 2 rows hold the score token '<\|score\|>' \(id 7\) \(.*train\.jsonl:2: the prompt",
    ):
        read(tmp_path, model, GOOD, ("what is <|score|>", "2"))


def test_an_answer_with_the_score_token_is_refused_by_its_row(tmp_path, model):
    with pytest.raises(CheckFailed, match=r"train\.jsonl:3: the answer\); choose a token"):
        read(tmp_path, model, GOOD, GOOD, ("what is 2", "2 <|score|>"))


def test_validation_data_is_checked_too(tmp_path, model):
    with pytest.raises(CheckFailed, match=r"data\.validation: 1 .*validation\.jsonl:1: the prompt"):
        read(tmp_path, model, GOOD, validation=[("<|score|>", "1")])


def test_a_run_whose_references_no_response_can_equal_does_not_start(tmp_path, model):
    prose = ("what is 1", "one of the many things that are not two")
    with pytest.raises(UserError, match=r"data\.train: no response can equal 1 of 1 references: prose"):
        read(tmp_path, model, prose)
    with pytest.raises(UserError, match=r"data\.validation: no response can equal 1 of 1"):
        read(tmp_path, model, GOOD, validation=[prose])


@pytest.mark.parametrize("own", [False, True])
def test_the_answer_is_taken_out_of_a_worked_solution_for_the_projects_grader_alone(tmp_path, model, own):
    worked = ("what is 1 + 1", "1 and 1 are two of them, which is what was asked\n#### 2")
    (tmp_path / "own.py").write_text("def reward(response, answer):\n    return 0.0\n")
    inputs = read(tmp_path, model, worked, reward=f"{tmp_path}/own.py:reward" if own else "math_verify")
    assert [prompt.answer for prompt in inputs.train] == [worked[1] if own else "2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"score_token": 99},
            r"laser\.score_token: token id 99 is not in the model's vocabulary; expected 0 to 7",
        ),
        ({"stop_token_ids": [1, 8]}, r"rollout\.stop_token_ids: token id 8 is not in .* expected 0 to 7"),
        (
            {"stop_token_ids": [1, SCORE]},
            r"laser\.score_token '<\|score\|>' is id 7, which also ends a response",
        ),
    ],
)
def test_ids_that_cannot_be_used_are_refused(tmp_path, model, settings, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, model, GOOD, **settings)
