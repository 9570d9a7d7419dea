"""Tokens of all readouts are looked for wherever a prompt comes from, and a dry run says what readouts came to."""

import io
import json

import pytest
from helpers.models import save_tiny_model, save_word_tokenizer
from helpers.runs import run_config
from rich.console import Console

from megatron_laser.config import ConfigError, resolve_plan
from megatron_laser.config.plan.view import render_plan
from megatron_laser.errors import DataError
from megatron_laser.evaluation.benchmarks.run import evaluate_benchmarks
from megatron_laser.evaluation.benchmarks.settings import load_benchmarks
from megatron_laser.evaluation.engine_choice import EngineChoice
from megatron_laser.evaluation.model_folder import load_model_folder
from megatron_laser.run.inputs import read_inputs
from megatron_laser.run.preflight import CheckFailed
from megatron_laser.testtime.chat_request import RequestError, parse_chat_request

WORDS = ["<unk>", "<eos>", "what", "is", "1", "2", "<|score|>", "<|yes|>", "<|no|>", "<|cut|>"]
SCORE, YES, NO, CUT = range(6, 10)
READOUTS = [
    {"tokens": ["<|yes|>", "<|no|>"], "score": "pair_sigmoid", "name": "end"},
    {"position": {"every": 4}, "name": "prefix", "weight": 0.5, "warmup_steps": 1},
    {"tokens": CUT, "position": {"every": 2}, "name": "often", "ref_logprob": -9.0, "weight": 0},
]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}<|no|> "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training run's folder: config.yaml, and its model in hf/."""
    folder = tmp_path_factory.mktemp("run")
    save_word_tokenizer(folder / "hf", WORDS)
    save_tiny_model(folder / "hf", "llama3-rope", vocab_size=len(WORDS))
    config(folder, folder)
    return folder


def config(target, folder, *, readouts=READOUTS, train=("what is 1",), template=False, **laser):
    file = target / "train.jsonl"
    file.write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in train))
    return run_config(
        target,
        folder / "hf",
        data={"train": str(file), "apply_chat_template": template, "prompt_suffix": ""},
        laser={"score_token": "<|score|>", "ref_logprob": -20.0, "readouts": readouts, **laser},
    )


def refusal(target, folder, **changes):
    with pytest.raises(CheckFailed) as caught:
        read_inputs(config(target, folder, **changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("token", "whose"),
    [
        ("<|yes|>", r"'<|yes|>' (id 7) of readout 'end' (laser.readouts[0].tokens)"),
        ("<|no|>", r"'<|no|>' (id 8) of readout 'end' (laser.readouts[0].tokens)"),
        ("<|score|>", r"the score token '<|score|>' (id 6)"),
        ("<|cut|>", r"'<|cut|>' (id 9) of readout 'often' (laser.readouts[2].tokens)"),
    ],
)
def test_no_prompt_may_hold_a_token_of_any_readout(tmp_path, folder, token, whose):
    said = refusal(tmp_path, folder, train=("what is 1", f"what is {token}"))
    assert f"data.train: 1 prompts or answers of 2 rows hold {whose} (" in said
    assert "train.jsonl:2: the prompt)" in said


def test_a_template_that_writes_a_token_is_told_from_a_row_that_has_it(tmp_path, folder, monkeypatch):
    template = folder / "hf" / "chat_template.jinja"
    template.write_text(TEMPLATE)
    try:
        said = refusal(tmp_path, folder, train=("what is 1", "what <|no|>"), template=True)
        model = load_model_folder(folder)
    finally:
        template.unlink()
    assert "2 prompts or answers of 2 rows hold '<|no|>' (id 8) of readout 'end'" in said
    assert "train.jsonl:1: what the chat template, system prompt or prompt suffix add to the prompt" in said
    assert "train.jsonl:2: the prompt" in said
    assert "choose a token for laser.readouts[0].tokens" in said
    assert chat(model, "what is 1", template=True).startswith(
        "`messages`: the chat template, system prompt or prompt suffix holds '<|no|>' (id 8) of readout 'end'"
    )


def test_without_laser_the_token_that_is_named_is_looked_for_all_the_same(tmp_path, folder):
    said = refusal(tmp_path, folder, train=("what <|score|>",), readouts=None, enabled=False)
    assert "hold the score token '<|score|>' (id 6)" in said


def test_data_without_any_of_them_starts_a_run(tmp_path, folder):
    inputs = read_inputs(config(tmp_path, folder))
    inputs.folder.release()
    assert inputs.score_token_id == YES


def chat(model, *contents, template=False):
    """What a request with these messages of the user is refused with."""
    body = {"model": "m", "messages": [{"role": "user", "content": text} for text in contents]}
    with pytest.raises(RequestError) as caught:
        parse_chat_request(
            body,
            model,
            default_k=1,
            max_k=4,
            max_new_tokens=4,
            apply_chat_template=template,
            prompt_suffix="",
        )
    return str(caught.value)


@pytest.mark.parametrize("token", ["<|yes|>", "<|no|>", "<|score|>", "<|cut|>"])
def test_requests_and_benchmarks_are_refused_all_of_them(tmp_path, folder, token):
    model = load_model_folder(folder)
    (words,) = [one.words for one in model.readout_tokens if one.token.text == token]
    assert chat(model, f"what is {token}") == (
        f"`messages`: messages[0] holds {words}, which stands for the model's own judgement"
    )
    file = tmp_path / "few.jsonl"
    file.write_text(json.dumps({"problem": f"what {token}", "answer": "1"}) + "\n")
    (benchmark,) = load_benchmarks(file, ["few.apply_chat_template=false", "few.max_new_tokens=4"])
    with pytest.raises(DataError) as caught:
        evaluate_benchmarks(model, [benchmark], EngineChoice(), tmp_path / "out", deadline=9.0)
    assert f"hold {words} (" in str(caught.value) and "few.jsonl:1: the prompt" in str(caught.value)


def test_a_score_token_given_by_hand_is_refused_by_its_option(folder):
    model = load_model_folder(folder / "hf", score_token="<|cut|>", ref_logprob=-9.0)
    assert "holds the score token '<|cut|>' (id 9)" in chat(model, "what <|cut|>")
    assert [(one.setting, one.token.id) for one in model.readout_tokens] == [("--score-token", CUT)]
    of_run = load_model_folder(folder, score_token="<|score|>")
    assert [one.token.id for one in of_run.readout_tokens] == [SCORE, NO, CUT]
    with pytest.raises(ConfigError, match=r"--score-token: '<\|yess\|>' is not in the tokenizer"):
        load_model_folder(folder / "hf", score_token="<|yess|>")


def test_a_dry_run_has_a_line_for_each_readout_as_resolved(tmp_path, folder):
    changes = {"reasoning_warmup_steps": 0, "self_reward_warmup_steps": 1, "alpha": 0.1, "tau": 0.2}
    plan = resolve_plan(config(tmp_path, folder, **changes))
    lines = {one.name: (one.on, one.detail) for one in plan.features}
    assert lines["readout end"] == (
        True,
        "<|yes|>, <|no|> at eos: pair_sigmoid; target binary, loss mse, weight 0.1 from step 1 of 3; "
        "advantages mix, tau 0.2 from step 2 of 3",
    )
    assert lines["readout prefix"] == (
        True,
        "<|score|> at every 4 tokens: scaled_logratio to ref_logprob -20, beta 0.4; target binary, loss mse, "
        "weight 0.5 from step 2 of 3; advantages none",
    )
    assert lines["readout often"] == (
        False,
        "9 at every 2 tokens: scaled_logratio to ref_logprob -9, beta 0.4; target binary, loss mse, weight 0; "
        "advantages none",
    )
    assert not {"self-reward loss", "self-reward advantages"} & set(lines)
    assert lines["old-policy pass"][0]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_plan(plan))
    shown = console.export_text()
    for word, number in (("<|yes|>", YES), ("<|no|>", NO), ("<|score|>", SCORE), ("<|cut|>", CUT)):
        assert f"{word} (id {number}), verified" in shown


def test_a_dry_run_shows_every_choice_and_what_would_not_start(tmp_path, folder):
    readouts = [
        {
            "position": "before_eos",
            "target": {"group_shrunk": 0.7},
            "targets": [0.9, 0.1],
            "tokens": ["<|yes|>", "<|no|>"],
            "score": "normalised",
            "loss": "margin",
            "margin": 0.5,
            "advantages": "discrepancy",
            "kappa": 2,
        },
        {"name": "paragraph", "position": {"delimiter": "\n\n"}, "target": "prefix_value", "warmup_steps": 7},
    ]
    plan = resolve_plan(config(tmp_path, folder, readouts=readouts, reference="model", loss="bce"))
    first, second = (one for one in plan.features if one.name.startswith("readout "))
    assert first.detail == (
        "<|yes|>, <|no|> at before_eos: normalised; target group_shrunk 0.7 on [0.9, 0.1], loss margin 0.5, "
        "weight 0.1, which would start at step 201, but run.steps is 3; advantages discrepancy, kappa 2, which "
        "would start at step 401, but run.steps is 3"
    )
    assert (first.on, second.on) == (False, False)
    assert second.detail.startswith(
        "<|score|> at delimiter '\\n\\n': scaled_logratio to the initial model, beta 0.4; target prefix_value, loss bce"
    )


@pytest.mark.parametrize(
    ("readouts", "message"),
    [
        (
            [{}, {"tokens": "<|yess|>", "ref_logprob": -9.0}],
            r"laser.readouts[1].tokens: '<|yess|>' is not in",
        ),
        (
            [{}, {"tokens": 1, "ref_logprob": -9.0}],
            "laser.readouts[1].tokens 1 is id 1, which also ends a response",
        ),
        ([{"tokens": 10}], "laser.readouts[0].tokens: token id 10 is not in the model's vocabulary"),
        (
            [{}, {"tokens": ["<|yes|>", YES], "score": "pair_sigmoid"}],
            "laser.readouts[1].tokens: 7 is id 7, which stands there already",
        ),
    ],
)
def test_a_token_that_cannot_be_read_is_named_where_it_was_written(tmp_path, folder, readouts, message):
    settings = config(tmp_path, folder, readouts=readouts)
    for look in (resolve_plan, read_inputs):
        with pytest.raises((ConfigError, CheckFailed)) as caught:
            look(settings)
        assert message in str(caught.value)
        assert "laser.score_token" not in str(caught.value)
