"""Arguments of the chat template and the system prompt: the same everywhere prompts are made, and never for nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from helpers.models import save_tiny_model, save_word_tokenizer
from helpers.runs import run_config
from test_evaluation_detail import right
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import ConfigError, load_config, resolved_yaml
from megatron_laser.data import ChatOptions, DataError, Row, build_prompts, check_chat_options
from megatron_laser.data.chat import template_variables
from megatron_laser.data.end_of_response import end_of_turn
from megatron_laser.data.tokenizer import load_tokenizer
from megatron_laser.evaluation.benchmarks.settings import load_benchmarks
from megatron_laser.evaluation.model_folder import load_model_folder
from megatron_laser.run.preflight.model import template_finding
from megatron_laser.testtime.chat_request import parse_chat_request
from megatron_laser.testtime.evaluation_answers import read_evaluation_answers
from megatron_laser.testtime.prompts import prompt_token_ids
from megatron_laser.testtime.scoring import read_answers

WORDS = [
    "<unk>",
    "<eos>",
    "<sys>",
    "<user>",
    "<bot>",
    "<think>",
    "</think>",
    "Be",
    "brief",
    "loud",
    "1",
    "2",
    "+",
    "<z>",
]
# As Qwen3's: the system message is the chat's own, and without thinking the answer begins behind an empty thought.
TEMPLATE = (
    "{%- for message in messages %}{% generation %}"
    "{{- {'system': '<sys> ', 'user': '<user> ', 'assistant': '<bot> '}[message.role] + message.content + ' <eos> ' }}"
    "{% endgeneration %}{%- endfor %}"
    "{%- if add_generation_prompt %}<bot>"
    "{%- if enable_thinking is defined and enable_thinking is false %} <think> </think>{% endif %}"
    "{%- if style %} {{ style }}{% endif %}{% endif %}"
)
OPTIONS = ChatOptions({"enable_thinking": False}, "Be brief")
EXPECTED = "<sys> Be brief <eos> <user> 1 + 2 <eos> <bot> <think> </think>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_tiny_model(folder, "llama3-rope", vocab_size=len(WORDS))
    save_word_tokenizer(folder, WORDS)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def words(ids):
    return " ".join(WORDS[index] for index in ids)


def build(tokenizer, options, *, template=True, **row):
    rows = [Row(0, "1 + 2", "3", "d.jsonl:1", **row)]
    settings = dict(
        prompt_suffix="", apply_chat_template=template, max_prompt_tokens=40, vocab_size=len(WORDS)
    )
    return words(build_prompts(rows, tokenizer, options=options, **settings)[0][0].token_ids)


def test_arguments_and_system_prompt_reach_the_template(tokenizer):
    assert build(tokenizer, ChatOptions()) == "<user> 1 + 2 <eos> <bot>"
    assert build(tokenizer, OPTIONS) == EXPECTED
    assert build(tokenizer, ChatOptions({"style": "loud"})) == "<user> 1 + 2 <eos> <bot> loud"


def test_a_conversation_keeps_its_own_system_message(tokenizer):
    own = (("system", "loud"), ("user", "1"), ("assistant", "2"))
    assert build(tokenizer, OPTIONS, turns=own).startswith(
        "<sys> loud <eos> <user> 1 <eos> <bot> 2 <eos> <user> 1 + 2"
    )
    assert build(tokenizer, OPTIONS, turns=own[1:]).startswith("<sys> Be brief <eos> <user> 1 <eos>")


def test_every_way_to_a_prompt_gives_the_same_ids(folder, tokenizer, tmp_path):
    settings = dict(apply_chat_template=True, options=OPTIONS)
    assert words(prompt_token_ids({"prompt": "1 + 2"}, tokenizer, **settings)) == EXPECTED
    model = load_model_folder(folder)
    body = {"model": "m", "messages": [{"role": "user", "content": "1 + 2"}]}
    limits = dict(default_k=1, max_k=1, max_new_tokens=4, prompt_suffix="")
    assert words(parse_chat_request(body, model, **limits, **settings).prompt_ids) == EXPECTED
    own = {"model": "m", "messages": [{"role": "system", "content": "loud"}, *body["messages"]]}
    assert words(parse_chat_request(own, model, **limits, **settings).prompt_ids).startswith(
        "<sys> loud <eos> <user>"
    )
    source = tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "1 + 2", "response": "2"}\n')
    assert words(read_answers(model, source, prompt_suffix="", **settings).pairs[0][0]) == EXPECTED


def test_an_argument_that_the_template_does_not_use_is_refused_with_the_nearest(tokenizer):
    assert template_variables(tokenizer) == {"enable_thinking", "style"}
    check_chat_options(tokenizer, OPTIONS)
    with pytest.raises(
        DataError, match=r"data\.chat_template_arguments: .*'enable_thinkng'; did you mean 'enable_thinking'"
    ):
        build(tokenizer, ChatOptions({"enable_thinkng": False}))
    with pytest.raises(
        DataError, match=r"math\.chat.* does not use 'tools' \(its variables: enable_thinking, style\)"
    ):
        check_chat_options(tokenizer, ChatOptions({"tools": []}), section="math")
    bare = SimpleNamespace(chat_template="{{ bos_token }}{{ messages[0].content }}", special_tokens_map={})
    with pytest.raises(DataError, match="it has no variables"):
        check_chat_options(bare, ChatOptions({"x": 1}))


def test_a_template_that_cannot_be_parsed_is_left_to_rendering(tokenizer):
    for template in ("{% if %}", {"tool_use": "{{ x }}"}, None):
        assert template_variables(SimpleNamespace(chat_template=template, special_tokens_map={})) is None
    several = SimpleNamespace(chat_template={"default": "{{ x }}"}, special_tokens_map={})
    assert template_variables(several) == {"x"}


def test_without_a_template_nothing_can_be_given_to_it(tokenizer):
    with pytest.raises(DataError, match=r"need data\.apply_chat_template: true"):
        build(tokenizer, OPTIONS, template=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"chat_template_arguments": {"tokenize": True}}, "'tokenize' belongs to the rendering itself"),
        ({"chat_template_arguments": {"enable thinking": 1}}, "'enable thinking' is none"),
        ({"chat_template_arguments": ["x"]}, "data.chat_template_arguments: expected"),
        ({"system_prompt": ""}, "data.system_prompt"),
        (
            {"system_prompt": "x", "apply_chat_template": False},
            "data.system_prompt: needs data.apply_chat_template: true",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, folder, data, message):
    with pytest.raises(ConfigError) as error:
        run_config(tmp_path, folder, data=data)
    assert message in str(error.value)


def test_one_argument_can_be_overridden_and_the_others_stay(tmp_path, folder):
    given = {"chat_template_arguments": {"enable_thinking": True, "style": "loud"}}
    config = run_config(tmp_path, folder, "data.chat_template_arguments.enable_thinking=false", data=given)
    assert config.data.chat_template_arguments == {"enable_thinking": False, "style": "loud"}
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(config))
    assert load_config(again) == config
    first = run_config(tmp_path, folder, "data.chat_template_arguments.style=loud")
    assert first.data.chat_template_arguments == {"style": "loud"}


def test_check_shows_the_prompt_as_it_will_be_and_refuses_a_system_prompt_that_gets_lost(
    tmp_path, folder, tokenizer
):
    data = {"chat_template_arguments": {"enable_thinking": False}, "system_prompt": "Be brief"}
    config = run_config(tmp_path, folder, data=data)
    finding = template_finding(config, tokenizer)
    assert finding.level == "ok" and "<sys> Be brief" in finding.text and "<think> </think>" in finding.text
    deaf = load_tokenizer(folder)
    deaf.chat_template = TEMPLATE.replace("messages %}", "messages if message.role != 'system' %}")
    finding = template_finding(config, deaf)
    assert (
        finding.level == "error" and "data.system_prompt is not in what the template renders" in finding.text
    )
    strict = load_tokenizer(folder)
    strict.chat_template = (
        "{{ raise_exception('no system role') if messages[0].role == 'system' }}{{ enable_thinking }}"
    )
    with pytest.raises(DataError, match="no system role"):
        template_finding(config, strict)


def test_the_end_of_a_turn_is_that_of_the_arguments(tokenizer):
    end = end_of_turn(tokenizer, OPTIONS)
    assert end is not None and end.id == WORDS.index("<eos>")


@pytest.fixture
def trained(tmp_path, folder):
    """The output folder of a run with arguments and a system prompt, as far as test-time commands look at it."""
    data = {
        "chat_template_arguments": {"enable_thinking": False},
        "system_prompt": "Be brief",
        "prompt_suffix": "",
    }
    laser = {"score_token": WORDS.index("<z>")}
    config = run_config(tmp_path / "conf", folder, data=data, laser=laser)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(resolved_yaml(config))
    (run / "hf").symlink_to(folder)
    return run


def test_a_trained_folder_is_evaluated_with_what_it_was_trained_with_unless_told_otherwise(trained, tmp_path):
    model = load_model_folder(trained)
    data = tmp_path / "test.jsonl"
    data.write_text('{"problem": "1 + 2", "answer": "3"}\n')
    (same,) = load_benchmarks(data, from_run=model.from_run)
    assert (same.chat_template_arguments, same.system_prompt) == ({"enable_thinking": False}, "Be brief")
    overrides = ["test.chat_template_arguments={enable_thinking: true}", 'test.system_prompt=""']
    (other,) = load_benchmarks(data, overrides, from_run=model.from_run)
    assert (other.chat_template_arguments, other.system_prompt) == ({"enable_thinking": True}, "")
    (plain,) = load_benchmarks(data, ["test.apply_chat_template=false"], from_run=model.from_run)
    assert (plain.chat_template_arguments, plain.system_prompt) == ({}, "")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], EXPECTED),
        (["--system-prompt", ""], EXPECTED.removeprefix("<sys> Be brief <eos> ")),
        (["--chat-template-argument", "enable_thinking=true"], EXPECTED.removesuffix(" <think> </think>")),
        (["--no-chat-template"], "1 + 2"),
    ],
)
def test_score_takes_them_from_the_run_or_from_its_options(trained, tmp_path, monkeypatch, options, expected):
    source = tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "1 + 2", "response": "2"}\n')
    seen = []

    def stop(model, source, **settings):
        seen.append(read_answers(model, source, **settings).pairs[0][0])
        raise DataError("that is enough")

    monkeypatch.setattr("megatron_laser.testtime.scoring.read_answers", stop)
    CliRunner().invoke(app, ["score", str(trained), str(source), *options])
    assert [words(ids) for ids in seen] == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat-template-argument", "enable_thinking"], "expected NAME=VALUE"),
        (["--chat-template-argument", "x=1"], "does not use 'x'"),
        (["--no-chat-template", "--system-prompt", "x"], "are for a chat template"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_model_is_loaded(trained, tmp_path, options, message):
    source = tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "1 + 2", "response": "2"}\n')
    result = CliRunner().invoke(app, ["score", str(trained), str(source), *options], env={"COLUMNS": "400"})
    assert result.exit_code != 0
    assert message in result.output + str(result.exception)


@pytest.mark.parametrize("options", [None, OPTIONS], ids=["as in the evaluation", "as in training"])
def test_answers_of_an_evaluation_stand_behind_the_prompts_that_were_asked(folder, tmp_path, options):
    """And evaluations of earlier versions, which had no such settings, are read as they were."""
    data = tmp_path / "problems.jsonl"
    data.write_text('{"problem": "1 + 2", "answer": "3"}\n')
    asked = {} if options else {"chat_template_arguments": OPTIONS.arguments, "system_prompt": "Be brief"}
    settings = {"name": "sums", "path": str(data), "samples": 1, "max_new_tokens": 4, "max_prompt_tokens": 40}
    settings |= {"max_problems": None, "temperature": 1.0, "top_p": 1.0, "seed": 1, "reward": "math_verify"}
    settings |= {"prompt_key": "problem", "answer_key": "answer", "id_key": "id", "prompt_suffix": ""}
    settings |= {"apply_chat_template": True} | asked
    record = right(0, 0, score=0.5)
    record = replace(record, problem="1 + 2", answer="3", response="2")
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "records.jsonl").write_text(json.dumps(asdict(record)) + "\n")
    listed = {"sums": {"settings": settings, "summary": {"num_responses": 1}}}
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": listed, "model": "m"}))
    model = load_model_folder(folder, score_token="<z>", ref_logprob=-3.0)
    found = read_evaluation_answers(model, tmp_path, options=options)
    assert model.tokenizer.decode(found.pairs[0][0]) == EXPECTED
