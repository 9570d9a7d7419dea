"""Rows to prompts: templates, limits, and ids within the vocabulary."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import processors

from megatron_laser.data import DataError, Row, build_prompts, prompt_findings
from megatron_laser.testtime.prompts import prompt_token_ids
from megatron_laser.types import Prompt

WORDS = ["<unk>", "<bos>", "<user>", "<assistant>", "what", "is", "1", "2", "+", "boxed"]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", WORDS.index("<bos>"))]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=TEMPLATE)


def words(prompt: Prompt) -> str:
    return " ".join(WORDS[index] for index in prompt.token_ids)


def row(number: int, problem: str) -> Row:
    return Row(number, problem, "3", f"train.jsonl:{number + 1}")


def build(rows: list[Row], tokenizer: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "prompt_suffix": " boxed",
        "apply_chat_template": True,
        "max_prompt_tokens": 8,
        "vocab_size": len(WORDS),
    }
    return build_prompts(rows, tokenizer, **{**settings, **changes})


def test_the_chat_template_asks_for_the_generation_and_adds_no_second_bos(tokenizer: Any) -> None:
    prompts, dropped = build([row(0, "what is 1 + 2")], tokenizer)
    assert words(prompts[0]) == "<user> what is 1 + 2 boxed <assistant>"
    assert (prompts[0].row, prompts[0].problem, prompts[0].answer) == (0, "what is 1 + 2", "3")
    assert dropped.rows == () and dropped.total == 1


def test_it_gives_the_ids_of_apply_chat_template(tokenizer: Any) -> None:
    prompts, _ = build([row(0, "what is 1 + 2")], tokenizer)
    messages = [{"role": "user", "content": "what is 1 + 2 boxed"}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert prompts[0].token_ids == list(expected["input_ids"])
    assert all(type(token_id) is int for token_id in prompts[0].token_ids)


def test_plain_text_keeps_the_tokenizer_s_special_tokens(tokenizer: Any) -> None:
    prompts, _ = build([row(0, "1 + 2")], tokenizer, apply_chat_template=False)
    assert words(prompts[0]) == "<bos> 1 + 2 boxed"


@pytest.fixture
def template_with_bos(tokenizer: Any) -> Any:
    """The tokenizer's template writes BOS itself, as Llama's does."""
    plain, tokenizer.chat_template = tokenizer.chat_template, "<bos> " + TEMPLATE
    yield tokenizer
    tokenizer.chat_template = plain


def test_a_text_that_brings_its_bos_gets_no_second_one(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(0, "<bos> 1 + 2"), row(1, "2"), row(2, "<bos> <bos> 1")]
    with caplog.at_level(logging.WARNING):
        prompts, report = build(rows, tokenizer, apply_chat_template=False)
    assert [words(prompt) for prompt in prompts] == ["<bos> 1 + 2 boxed", "<bos> 2 boxed", "<bos> 1 boxed"]
    assert report.bos_repeated == ("train.jsonl:1", "train.jsonl:3")
    assert (
        "2 of 3 prompts bring the BOS along" in caplog.text and "train.jsonl:1, train.jsonl:3" in caplog.text
    )


def test_nor_does_one_that_goes_through_a_template_that_writes_it(template_with_bos: Any) -> None:
    prompts, report = build([row(0, "<bos> 1 + 2"), row(1, "2")], template_with_bos)
    assert [words(prompt) for prompt in prompts] == [
        "<bos> <user> 1 + 2 boxed <assistant>",
        "<bos> <user> 2 boxed <assistant>",
    ]
    assert report.bos_repeated == ("train.jsonl:1",)


def test_test_time_prompts_have_the_ids_of_training(template_with_bos: Any) -> None:
    for problem in ("<bos> 1 + 2", "2"):
        for template in (True, False):
            (prompt,), _ = build([row(0, problem)], template_with_bos, apply_chat_template=template)
            given = prompt_token_ids(
                {"prompt": problem}, template_with_bos, apply_chat_template=template, prompt_suffix=" boxed"
            )
            assert given == prompt.token_ids


def test_what_a_tokenizer_puts_behind_texts_is_left_out(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    ids = [(word, WORDS.index(word)) for word in ("<bos>", "<unk>")]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <unk>", special_tokens=ids)
    try:
        with caplog.at_level(logging.WARNING):
            prompts, _ = build([row(0, "<bos> 1")], tokenizer, apply_chat_template=False)
    finally:
        backend.post_processor = before
    assert words(prompts[0]) == "<bos> 1 boxed"
    assert "the tokenizer puts '<unk>' behind every text" in caplog.text


def test_lengths_are_looked_at_with_counts_and_places(tokenizer: Any) -> None:
    rows = [row(0, "1"), row(1, "<bos> 1 + 2"), *(row(number, "1 + 1 + 1 + 1") for number in range(2, 6))]
    _, report = build(rows, tokenizer, apply_chat_template=False, max_prompt_tokens=5)
    assert report.lengths == (3, 5, 9, 9, 9, 9)
    lengths, bos = prompt_findings(report, name="data.validation")
    assert (lengths.topic, lengths.level) == ("prompt lengths", "warning")
    assert lengths.text == (
        "data.validation: 6 prompts of 3 to 9 tokens (half have at most 9, 90 % 9, 99 % 9); 4 (66.7%) are over "
        "data.max_prompt_tokens = 5 and left out"
    )
    assert lengths.examples == tuple(f"train.jsonl:{line}: 9 tokens" for line in (3, 4, 5))
    assert (bos.level, bos.examples) == ("warning", ("train.jsonl:2",))
    _, fine = build(rows, tokenizer, apply_chat_template=False, max_prompt_tokens=9)
    assert [finding.level for finding in prompt_findings(fine)] == ["ok", "warning"]


def test_a_suffix_that_is_no_text_is_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data\.prompt_suffix holds half of a surrogate pair"):
        build([row(0, "1")], tokenizer, prompt_suffix=" \ud83d")


def test_without_a_template_the_setting_is_named(tokenizer: Any) -> None:
    class Bare:
        chat_template = None

    with pytest.raises(DataError, match=r"data\.apply_chat_template: false"):
        build([row(0, "1")], Bare())


def test_long_prompts_are_dropped_counted_and_named(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(0, "1 + 2"), *(row(number, "1 + 1 + 1 + 1") for number in range(1, 8)), row(8, "2")]
    with caplog.at_level(logging.WARNING):
        prompts, dropped = build(rows, tokenizer)
    assert [prompt.row for prompt in prompts] == [0, 8]
    assert dropped.rows == tuple((f"train.jsonl:{number + 1}", 10) for number in range(1, 8))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "7 of 9 prompts are longer than data.max_prompt_tokens = 8" in message
    assert "train.jsonl:2 (10 tokens)" in message and "and 2 more" in message


def test_a_prompt_of_exactly_the_limit_stays(tokenizer: Any) -> None:
    assert len(build([row(0, "1 + 2")], tokenizer, max_prompt_tokens=6)[0]) == 1


def test_no_prompt_left_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no prompts are left: 1 of 1 .*train\.jsonl:1"):
        build([row(0, "1 + 2")], tokenizer, max_prompt_tokens=5)
    with pytest.raises(DataError, match="no rows"):
        build([], tokenizer)


def test_an_id_outside_the_vocabulary_is_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: token id 9 is not in the model's vocabulary of 9"):
        build([row(0, "1 + 2")], tokenizer, vocab_size=9)


def test_more_rows_than_one_batch_keep_their_order(tokenizer: Any) -> None:
    prompts, _ = build([row(number, "1" if number % 2 else "2") for number in range(2345)], tokenizer)
    assert [prompt.row for prompt in prompts] == list(range(2345))
    assert [words(prompts[number]).split()[1] for number in (0, 999, 1000, 2344)] == ["2", "1", "2", "2"]


def test_the_earlier_turns_of_a_conversation_stand_before_its_question(tokenizer: Any) -> None:
    turns = (("user", "what 1"), ("assistant", "2"))
    chat = Row(0, "is 1 + 2", "3", "train.jsonl:1", turns=turns)
    prompts, _ = build([chat, row(1, "1 + 2")], tokenizer, max_prompt_tokens=20)
    assert words(prompts[0]) == "<user> what 1 <user> 2 <user> is 1 + 2 boxed <assistant>"
    assert words(prompts[1]) == "<user> 1 + 2 boxed <assistant>"
    assert prompts[0].problem == "is 1 + 2"
    with pytest.raises(
        DataError, match=r"train.jsonl:1: the problem is a conversation of 3 turns, which needs a chat"
    ):
        build([chat], tokenizer, apply_chat_template=False)
