"""What `check` says of tokenizer, chat template, end of response and score token."""

import dataclasses

import pytest
from helpers.models import save_tiny_model, save_word_tokenizer
from helpers.runs import run_config

from megatron_laser.config import ConfigError
from megatron_laser.config.model_folder.architecture import read_architecture
from megatron_laser.config.model_folder.special_tokens import ScoreToken, named_eos_ids, read_stop_token_ids
from megatron_laser.data import DataError
from megatron_laser.data.end_of_response import EndSources, TurnEnd, check_end_of_response, end_of_turn
from megatron_laser.data.tokenizer import load_tokenizer
from megatron_laser.evaluation.model_folder import load_model_folder
from megatron_laser.run.preflight.finding_log import FindingLog
from megatron_laser.run.preflight.model import (
    ModelInputs,
    check_sizes,
    score_token_finding,
    template_finding,
    vocabulary_finding,
)

WORDS = [
    "<unk>",
    "<eos>",
    "user",
    "assistant",
    "<|im_start|>",
    "<|im_end|>",
    "Which",
    "forty-two",
    "apples",
    "[END]",
]
EOS, IM_END = WORDS.index("<eos>"), WORDS.index("<|im_end|>")
CHATML_END = TurnEnd("<|im_end|>", IM_END)
PLAIN_END = TurnEnd("[END]", None)
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    save_tiny_model(folder, "llama3-rope", vocab_size=len(WORDS))
    save_word_tokenizer(folder, WORDS)
    return folder


@pytest.fixture
def tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def config(folder, tmp_path):
    return lambda **data: run_config(tmp_path, folder, data={"apply_chat_template": True, **data})


@pytest.mark.parametrize(
    ("sources", "level", "words"),
    [
        # The files, the tokenizer and the template agree, as in an instruct model.
        (
            EndSources(
                files={"generation_config.json": (IM_END, EOS)},
                tokenizer=EOS,
                turn_end=TurnEnd("<|im_end|>", IM_END),
                template_used=True,
            ),
            "ok",
            "",
        ),
        # A base model prompted through its template: what ends a turn ends no response.
        (
            EndSources(
                files={"generation_config.json": (EOS,)},
                tokenizer=EOS,
                turn_end=TurnEnd("<|im_end|>", IM_END),
                template_used=True,
            ),
            "warning",
            f"chat template ends a turn with {IM_END} '<|im_end|>'",
        ),
        # generation_config names another convention's id; without a template the tokenizer says what is right.
        (
            EndSources(files={"generation_config.json": (0,)}, tokenizer=EOS),
            "warning",
            "tokenizer's eos_token is 1 '<eos>'",
        ),
        (EndSources(files={"config.json": (EOS,)}, tokenizer=EOS), "ok", ""),
        (EndSources(files={"config.json": (EOS,)}, tokenizer=None), "ok", ""),
        # The user has chosen, and at least one of the two conventions is among them.
        (
            EndSources(setting=(EOS,), tokenizer=EOS, turn_end=CHATML_END, template_used=True),
            "note",
            "chat template ends a turn",
        ),
        (
            EndSources(setting=(0,), tokenizer=EOS, turn_end=CHATML_END, template_used=True),
            "warning",
            "chat template ends a turn",
        ),
        (
            EndSources(
                files={"config.json": (EOS,)},
                tokenizer=EOS,
                turn_end=PLAIN_END,
                template_used=True,
            ),
            "warning",
            "no special token",
        ),
        # A template that is not used says nothing about this run.
        (
            EndSources(
                files={"config.json": (EOS,)},
                tokenizer=EOS,
                turn_end=TurnEnd("<|im_end|>", IM_END),
                template_used=False,
            ),
            "ok",
            "",
        ),
    ],
)
def test_what_ends_a_response_is_compared(tokenizer, sources, level, words):
    finding = check_end_of_response(sources, tokenizer)
    assert finding.level == level and words in finding.text
    if level == "ok":
        assert not finding.examples and not finding.cure


def test_the_warning_says_what_each_names_what_is_used_and_the_cure(tokenizer):
    sources = EndSources(
        files={"generation_config.json": (EOS,), "config.json": (0,)},
        tokenizer=EOS,
        turn_end=TurnEnd("<|im_end|>", IM_END),
        template_used=True,
    )
    finding = check_end_of_response(sources, tokenizer)
    assert finding.text.startswith("responses end at 1 '<eos>' (generation_config.json), but ")
    assert finding.examples == (
        "generation_config.json: 1 '<eos>'",
        "config.json: 0 '<unk>'",
        "tokenizer's eos_token: 1 '<eos>'",
        "template's end of turn: 5 '<|im_end|>'",
    )
    assert finding.cure == "set rollout.stop_token_ids: [1, 5]"


def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(tokenizer):
    assert end_of_turn(tokenizer) == TurnEnd("<|im_end|>", IM_END)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} [END] {% endfor %}"
    assert end_of_turn(tokenizer) == TurnEnd("[END]", None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "level", "words"),
    [
        (CHATML, "ok", "<|im_start|> user Which 3 digits"),
        (None, "error", "the tokenizer has no chat template"),
        ("<|im_start|> assistant", "error", "the problem's text is not in what the template renders"),
        ("{{ messages[0].content }}", "warning", "ignores add_generation_prompt"),
    ],
)
def test_a_template_must_make_a_prompt_of_a_problem(tokenizer, config, template, level, words):
    tokenizer.chat_template = template
    finding = template_finding(config(), tokenizer)
    assert finding.level == level and words in finding.text


def test_a_template_that_is_not_used_is_not_rendered(tokenizer, config):
    tokenizer.chat_template = "{% broken"
    assert template_finding(config(apply_chat_template=False), tokenizer).level == "ok"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }", r"TemplateSyntaxError: .* \(line 1\)"),
        ("{{ raise_exception('only system messages') }}", "TemplateError: only system messages"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ a.b.c }}", "UndefinedError: 'a' is undefined"),
    ],
)
def test_a_broken_template_is_one_line_with_its_own_reason(tokenizer, config, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(
        DataError, match=f"cannot render a chat: {reason}.*; mend chat_template.jinja"
    ) as caught:
        template_finding(config(), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_token_without_a_row_in_the_model_is_found(tokenizer):
    assert vocabulary_finding(tokenizer, len(WORDS)).level == "ok"
    finding = vocabulary_finding(tokenizer, len(WORDS) - 1)
    assert finding.level == "warning" and finding.examples == ("9 '[END]'",)
    finding = vocabulary_finding(tokenizer, 1)
    assert finding.level == "error" and "eos among them" in finding.text


@pytest.mark.parametrize(
    ("token", "level", "words"),
    [
        (ScoreToken(5, "<|im_end|>", True), "ok", "'<|im_end|>', id 5"),
        (
            ScoreToken(5, None, False, "no token has this id in tokenizer.json"),
            "warning",
            "id 5 is unverified: no token",
        ),
        (
            ScoreToken(6, "Which", True, "not a special token: text may contain it"),
            "warning",
            "text may contain it",
        ),
    ],
)
def test_what_the_score_token_came_to(config, token, level, words):
    finding = score_token_finding(config(), token)
    assert finding.level == level and words in finding.text


def test_eos_ids_of_each_file_and_what_is_no_id(folder, tmp_path):
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [5, 1]}')
    assert named_eos_ids(tmp_path) == {"generation_config.json": (5, 1), "config.json": (1,)}
    assert read_stop_token_ids(tmp_path) == (5, 1)
    generation.write_text('{"eos_token_id": null}')
    assert read_stop_token_ids(tmp_path) == (1,)
    for wrong, words in (
        ('{"eos_token_id": ["<eos>"]}', "expected a token id"),
        ("[]", "expected an object, got list"),
    ):
        generation.write_text(wrong)
        with pytest.raises(ConfigError, match=words):
            read_stop_token_ids(tmp_path)


def test_a_broken_tokenizer_is_one_line(folder, tmp_path):
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for content in ("{", "[]", "{}"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(
            ConfigError, match=r"the tokenizer of .* cannot be loaded: \w+: .*; copy tokenizer\.json"
        ):
            load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_gets_none_made_up(folder, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ConfigError, match=r"has no tokenizer \(tokenizer\.json, "):
        load_tokenizer(tmp_path)


def test_sources_know_what_is_used():
    sources = EndSources(files={"generation_config.json": (3,), "config.json": (4,)})
    assert sources.used == (3,)
    assert dataclasses.replace(sources, setting=(7,)).used == (7,)
    assert EndSources().used == ()


def test_test_time_commands_say_it_too(folder, tmp_path, caplog):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    load_model_folder(tmp_path, with_score=False)
    assert "the tokenizer's eos_token is 1 '<eos>'" in caplog.text
    assert "set --stop-token-id: [5, 1]" in caplog.text
    caplog.clear()
    load_model_folder(tmp_path, stop_token_ids=(5, 1), with_score=False)
    assert not caplog.records


@pytest.mark.parametrize(
    ("context", "shown"), [(1, ""), (2, "; parallel.context 2 ranks share each sequence")]
)
def test_the_layout_names_context_where_sequences_are_shared(folder, tmp_path, context, shown):
    config = run_config(tmp_path, folder, parallel={"context": context})
    log = FindingLog(stop_at_errors=False)
    check_sizes(config, ModelInputs(architecture=read_architecture(folder)), log)
    texts = {finding.topic: finding.text for findings in log.groups.values() for finding in findings}
    assert texts["layout"] == f"parallel.tensor 1 and parallel.pipeline 1 divide the model{shown}"
