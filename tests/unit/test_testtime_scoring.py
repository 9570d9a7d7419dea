"""Scores for given answers: ids, texts, files; the choice among answers; the engine's one door."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.runs import run_config
from helpers.tiny_run import write_tiny_run
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.evaluation.engine_choice import other_weights
from megatron_laser.rewards import GradingPool
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.sglang_api import ServerFacts
from megatron_laser.testtime import (
    EngineChoice,
    Scorer,
    TestTimeError,
    choose,
    load_model_folder,
    open_engine,
)
from megatron_laser.testtime.prompts import check_messages, prompt_token_ids
from megatron_laser.testtime.scoring import read_answers, score_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    write_tiny_run(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model_folder(folder, score_token="<|score|>", ref_logprob=-5.0, beta=0.5)


@pytest.fixture(scope="module")
def scorer(model):
    with open_engine(EngineChoice(), model, deadline=60) as engine:
        yield Scorer(engine, model)


def reference(folder, ids):
    """0.5 * (log pi(<|score|>) + 5) by plain transformers."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return 0.5 * (float(network(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[2]) + 5.0)


def test_scores_are_those_of_a_plain_forward_at_the_end_token(folder, scorer):
    prompt, response = [5, 24, 6, 27], [25, 11, 26, 1]
    (scored,) = scorer.score_ids([(prompt, response)], deadline=60)
    assert scored.score == pytest.approx(reference(folder, [*prompt, *response]), abs=1e-5)
    assert scored.right == (scored.score > 0.5)
    (text,) = scorer.score([("1 + 2 ?", "\\boxed{ 7 }")])
    assert text.score == pytest.approx(scored.score, abs=1e-6)


def test_a_trained_runs_targets_are_the_scale_of_its_scores(folder, model, scorer, tmp_path):
    """Between the targets (0.6, -0.2) lies the decision at 0.2 of beta * (log pi - c_ref)."""
    (tmp_path / "hf").symlink_to(folder)
    run_config(tmp_path, folder, laser={"score_token": "<|score|>", "targets": [0.6, -0.2]})
    trained = load_model_folder(tmp_path)
    assert trained.targets == (0.6, -0.2) and model.targets == (1.0, 0.0)
    other = Scorer(scorer._engine, replace(model, targets=trained.targets))
    for raw in (0.6, -0.2, 0.21, 0.19):
        zc_logprob = raw / 0.5 - 5.0
        assert scorer.scored(zc_logprob).score == pytest.approx(raw)
        assert other.scored(zc_logprob).score == pytest.approx((raw + 0.2) / 0.8)
        assert other.scored(zc_logprob).right == (raw > 0.2)


def test_a_response_that_did_not_end_has_no_score(scorer):
    assert [s.score for s in scorer.score_ids([([5], [6, 7]), ([5], []), ([5], [1])], deadline=60)][:2] == [
        None,
        None,
    ]


def test_the_end_token_is_put_behind_a_text_once(scorer):
    assert scorer.response_ids("7 +") == scorer.response_ids("7 + <eos>") == [11, 24, 1]


def test_ids_that_would_end_a_server_are_refused_before_they_are_sent(scorer):
    for pair, message in (
        (([5, 28], [1]), "outside the vocabulary; expected 0 to 27"),
        (([-1], [1]), "outside the vocabulary"),
        (([], [1]), "the prompt has no tokens"),
        (([5] * 64, [1]), "65 tokens, but the model reads 64"),
    ):
        with pytest.raises(TestTimeError, match=message):
            scorer.score_ids([([5], [1]), pair], deadline=60)


def test_a_file_gets_scores_beside_its_rows(folder, model, scorer, tmp_path):
    rows = [
        {"id": 7, "prompt": "1 + 2 ?", "response": "\\boxed{ 7 }"},
        {"messages": [{"role": "user", "content": "1 + 2 ?"}], "response_ids": [25, 11, 26, 1]},
        {"prompt_ids": [5, 24, 6, 27], "response": "\\boxed{ 7 }", "finish_reason": "length"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out" / "scored.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    answers = read_answers(model, source, apply_chat_template=False, prompt_suffix="")
    counts = score_file(scorer, answers, target, deadline=60, batch=2)
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert [{k: row[k] for k in given} for row, given in zip(written, rows)] == rows
    assert written[0]["score"] == pytest.approx(written[1]["score"], abs=1e-6)
    assert written[0]["score"] == pytest.approx(0.5 * (written[0]["zc_logprob"] + 5.0))
    assert (written[2]["score"], written[2]["right"]) == (None, None)
    assert (counts["rows"], counts["scored"]) == (3, 2)


def test_records_of_an_evaluation_are_answers_too_and_the_change_since_then_is_told(model, scorer, tmp_path):
    prompt = {"prompt": "1 + 2 ?", "response": "\\boxed{ 7 }"}
    (now,) = scorer.score([(prompt["prompt"], prompt["response"])])
    rows = [
        {"problem": prompt["prompt"], "response": prompt["response"], "zc_logprob": now.zc_logprob - change}
        for change in (1.5, 0.5)
    ]
    source = tmp_path / "validation_step_0.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = read_answers(model, source, apply_chat_template=False, prompt_suffix="")
    counts = score_file(scorer, answers, tmp_path / "scored.jsonl", deadline=60)
    assert (counts["zc_change"], counts["zc_change_std"]) == pytest.approx((1.0, math.sqrt(0.5)), abs=1e-5)
    assert (counts["zc_mean"], counts["zc_std"]) == pytest.approx((now.zc_logprob, 0.0), abs=1e-5)
    written = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["score"] for row in written] == pytest.approx([now.score] * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "expected a JSON object, found a list"),
        ("{", "not JSON"),
        ('{"response": "7"}', "expected one of `prompt`, `messages` and `prompt_ids`, found none"),
        ('{"prompt": "1", "prompt_ids": [5], "response": "7"}', "expected one of"),
        ('{"prompt": "", "response": "7"}', "`prompt`: expected a text that is not empty"),
        ('{"prompt": "1"}', "expected `response` .text. or `response_ids`"),
        ('{"prompt": "1", "response_ids": ["7"]}', "expected a list of token ids"),
        ('{"prompt_ids": [99], "response": "7"}', "outside the vocabulary"),
        ('{"messages": [], "response": "7"}', "expected a list of one message or more"),
        (r'{"prompt": "1 \ud83d", "response": "7"}', r"half of a surrogate pair \(.ud83d, .* in `prompt`\)"),
        (r'{"prompt": "1", "response": "7", "note": {"\ude00": 1}}', r"half of .* in `note`\)"),
    ],
)
def test_a_row_that_does_not_fit_is_named(model, tmp_path, row, message):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "1 + 2 ?", "response": "3"}\n' + row + "\n")
    with pytest.raises(TestTimeError, match=f"in.jsonl:2: .*{message}"):
        read_answers(model, source, apply_chat_template=False, prompt_suffix="")


def test_texts_that_are_none_are_refused_by_their_pair(scorer):
    for pair, message in (
        (("1 \ud83d", "7"), "the prompt holds half"),
        (("1", "\ude00"), "`response` holds half"),
    ):
        with pytest.raises(TestTimeError, match=f"pair 1: {message} of a surrogate pair"):
            scorer.score([("1", "7"), pair])


def test_a_file_is_read_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("megatron_laser.rollout.in_process.InProcessEngine", load)
    arguments = ["score", str(folder), str(tmp_path / "none.jsonl"), "--score-token", "<|score|>"]
    result = CliRunner().invoke(app, [*arguments, "--ref-logprob", "-5"])
    assert result.exit_code == 2 and "no such file" in result.output


def test_chats_need_the_template_and_texts_do_not(model):
    tokenizer = model.tokenizer
    row = {"messages": [{"role": "user", "content": "1 + 2 ?"}]}
    assert prompt_token_ids(row, tokenizer, apply_chat_template=False) == [5, 24, 6, 27]
    assert prompt_token_ids(
        {"prompt": "1 + 2"}, tokenizer, apply_chat_template=False, prompt_suffix=" ?"
    ) == [5, 24, 6, 27]
    with pytest.raises(TestTimeError, match="no chat template; use --no-chat-template"):
        prompt_token_ids(row, tokenizer, apply_chat_template=True)
    with pytest.raises(TestTimeError, match="exactly one user message"):
        prompt_token_ids(
            {"messages": [*row["messages"], *row["messages"]]}, tokenizer, apply_chat_template=False
        )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "expected a list"),
        ([], "one message or more"),
        ([{"role": "robot", "content": "hi"}], r"messages\[0\]`: expected an object whose role"),
        ([{"role": "user"}], r"messages\[0\].content`: expected a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "expected text only"),
        ([{"role": "user", "content": "  "}], "every message is empty"),
    ],
)
def test_chats_that_say_nothing_are_refused(messages, message):
    with pytest.raises(TestTimeError, match=message):
        check_messages(messages)


def test_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "2"}]
    assert check_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "1 + 2"}]


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=1) as pool:
        yield pool


def test_a_sure_minority_wins_the_weighted_vote_and_its_best_response_is_given(pool):
    texts = ["\\boxed{2}", "\\boxed{2}", "\\boxed{0.5}", "so \\boxed{\\frac{1}{2}}", "cut"]
    choice = choose(texts, [0.1, 0.2, 0.6, 0.9, None], pool=pool)
    assert (choice.index, choice.method, choice.answer) == (3, "weighted_majority", "\\frac{1}{2}")
    assert choice.share == pytest.approx(1.5 / 1.8)
    assert choice.classes == [0, 0, 1, 1, None]
    plain = choose([*texts, "\\boxed{2}"], [0.1, 0.2, 0.6, 0.9, None, 0.0], vote="majority", pool=pool)
    assert (plain.index, plain.share) == (1, pytest.approx(3 / 5))
    assert choose(texts, [0.1, 1.2, 0.6, 0.9, None], vote="best_of", pool=pool).index == 1


def test_without_any_boxed_answer_the_best_score_decides():
    choice = choose(["a", "b", "c"], [0.1, 0.7, None])
    assert (choice.index, choice.method, choice.answer, choice.share) == (1, "best_of_all", None, None)
    assert choose(["a"], [None]).index == 0


def test_nothing_to_choose_from_and_unknown_votes_are_refused():
    with pytest.raises(TestTimeError, match="no response to choose from"):
        choose([], [])
    with pytest.raises(TestTimeError, match="expected weighted_majority, majority, best_of"):
        choose(["a"], [0.1], vote="plurality")


def test_a_model_without_score_constants_says_where_they_come_from(folder):
    with pytest.raises(TestTimeError, match="megatron-laser calibrate"):
        load_model_folder(folder).require_score()
    with pytest.raises(TestTimeError, match="also ends responses"):
        load_model_folder(folder, score_token="<eos>", ref_logprob=-5.0)
    with pytest.raises(TestTimeError, match="expected a log-prob, below 0"):
        load_model_folder(folder, score_token="<|score|>", ref_logprob=5.0)
    with pytest.raises(TestTimeError, match="--beta 0"):
        load_model_folder(folder, score_token="<|score|>", ref_logprob=-5.0, beta=0.0)
    with pytest.raises(TestTimeError, match="stop token id 99"):
        load_model_folder(folder, stop_token_ids=[99])


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://host", "http://"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(TestTimeError, match="is not a server's URL"):
        EngineChoice(urls=(url,))


def test_a_router_without_its_servers_is_refused():
    with pytest.raises(TestTimeError, match="name each of them with --url"):
        EngineChoice(router_url="http://127.0.0.1:2")


def test_urls_open_the_servers_client_with_key_and_model_and_other_weights_are_said(
    model, monkeypatch, caplog
):
    seen = {}

    class Client:
        @classmethod
        def connect(cls, urls, **options):
            seen.update(options, urls=urls)
            return cls()

        def identify_all(self):
            return {"http://127.0.0.1:1": ServerFacts("0.5.23", 1, "/models/another", "default", "cpu")}

        def close(self):
            seen["closed"] = True

    monkeypatch.setattr("megatron_laser.rollout.client.SglangEngine", Client)
    choice = EngineChoice(urls=("http://127.0.0.1:1",), api_key="secret", router_url="http://127.0.0.1:2")
    with open_engine(choice, model, deadline=5.0) as engine:
        assert isinstance(engine, Client)
    assert seen == {
        "urls": ["http://127.0.0.1:1"],
        "api_key": "secret",
        "expected": Expected(
            28,
            model_type="qwen2",
            sizes={
                "vocab_size": 28,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
            tied=False,
        ),
        "deadline": 5.0,
        "max_concurrency_per_server": 256,
        "router_url": "http://127.0.0.1:2",
        "closed": True,
    }
    assert f"was started on /models/another, not on {model.path}" in caplog.text
    assert not choice.repeatable and EngineChoice().repeatable


def test_a_servers_weights_are_those_of_the_folder_it_was_started_on_until_a_run_sends_others(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert other_weights(tmp_path / "model", tmp_path / "link", "default") == ""
    assert "not on" in other_weights(tmp_path / "model", tmp_path, "default")
    assert "'ab12-7', which a training run has sent" in other_weights(tmp_path, tmp_path, "ab12-7")


def test_a_log_prob_that_is_not_finite_is_an_error(scorer):
    with pytest.raises(RuntimeError, match="check the weights"):
        scorer.scored(math.nan)
