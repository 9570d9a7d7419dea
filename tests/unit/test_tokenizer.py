"""The tokenizer that a run uses is the one that the model folder describes."""

import json
import logging

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from megatron_laser.data.tokenizer import load_tokenizer

WORDS = ["<eos>", "<unk>", "two ", "plus ", "three"]
TEXT = "two plus three"


def make_folder(folder, model_type="qwen2"):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+ ?"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    config = Qwen2Config(vocab_size=len(WORDS)).to_dict() | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_rules_of_tokenizer_json_win_over_the_class_of_the_model_type(tmp_path, caplog):
    folder = make_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder, [TEXT])
    assert tokenizer(TEXT)["input_ids"] == [2, 3, 4]
    assert "the rules of tokenizer.json are used" in caplog.text


def test_an_agreeing_tokenizer_is_used_without_a_word(tmp_path, caplog):
    folder = make_folder(tmp_path, "llama")
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder, [TEXT])
    assert tokenizer(TEXT)["input_ids"] == [2, 3, 4]
    assert not caplog.text
