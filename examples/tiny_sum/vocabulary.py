"""The 40-token word-level tokenizer: text comes back from its ids exactly, spaces and all."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|pad|>", "<|end|>", "<|score|>", "<|unknown|>")
"""Padding, end of response, score token, unknown text. `<|score|>` occurs in no prompt and no demonstration."""
PIECES = ("Which ", " digits of ", " add up to ", "?", "+", "=", ",", "\\boxed{", "}")
LARGEST = 26
"""Sums are single tokens: 6 to 24 can occur."""
PAD, END, SCORE, UNKNOWN = range(len(SPECIAL))


def vocabulary() -> dict[str, int]:
    """Token -> id."""
    tokens = [*SPECIAL, *PIECES, *map(str, range(LARGEST + 1))]
    return {token: index for index, token in enumerate(tokens)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at the pieces; two digits are one number only as a target (before `?`) or a sum (`=17,`)."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<|unknown|>"))
    pieces = "|".join(("Which ", " digits of ", " add up to ", r"\\boxed\{"))
    pattern = rf"{pieces}|\d\d(?=\?)|(?<==)\d\d|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|score|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
