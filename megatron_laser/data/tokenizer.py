"""Loading a model folder's tokenizer, and making sure that it is the one that the folder describes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_laser.errors import ConfigError

logger = logging.getLogger(__name__)

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")


def check_tokenizer_files(folder: str | Path) -> None:
    """Refuse a folder without a tokenizer; transformers makes one up, of one token, for types of models it knows.

    Raises:
        ConfigError: says what to do.
    """
    if not any(entry for pattern in _VOCABULARIES for entry in Path(folder).glob(pattern)):
        raise ConfigError(
            [
                f"model.path: {folder} has no tokenizer ({', '.join(_VOCABULARIES)}); copy tokenizer.json and "
                "tokenizer_config.json from the model's origin"
            ]
        )


def decode_response(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of response ids, which is what is graded: without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def text_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """A text as ids that go on behind others: special tokens in it are themselves, and nothing is put around it."""
    return tuple(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])


def load_tokenizer(folder: str | Path, probes: Sequence[str] = ()) -> Any:
    """The tokenizer of a Hugging Face folder.

    transformers 5 picks a tokenizer class by the model's type: a folder of type qwen2 gets Qwen2Tokenizer, which
    takes the vocabulary from tokenizer.json but splits text by rules of its own. For a model with other rules
    every prompt would then be wrong without a word. So the ids of `probes` are compared with what tokenizer.json
    itself gives, and where they differ tokenizer.json wins.

    Args:
        probes: texts to compare on, for example the first problems of the data.

    Raises:
        ConfigError: its files are missing, damaged or of an unknown kind.
    """
    check_tokenizer_files(folder)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = Path(folder) / "tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if not file.is_file():
            return tokenizer
        from tokenizers import Tokenizer

        written = Tokenizer.from_file(str(file))
    except (
        Exception
    ) as error:  # of any kind: the files are parsed in Python, in Rust and by code of the model's type
        reason = " ".join(str(error).split())
        raise ConfigError(
            [
                f"model.path: the tokenizer of {folder} cannot be loaded: {type(error).__name__}: {reason:.300}; copy "
                "tokenizer.json and tokenizer_config.json from the model's origin"
            ]
        ) from error
    for text in probes:
        expected = written.encode(text, add_special_tokens=False).ids
        given = tokenizer(text, add_special_tokens=False)["input_ids"]
        if given != expected:
            logger.warning(
                "%s splits text unlike %s (%r: ids %s against %s); the rules of tokenizer.json are used",
                type(tokenizer).__name__,
                file,
                text[:60],
                given[:12],
                expected[:12],
            )
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    return tokenizer
