"""Prompts to token ids: the one place that decides which special tokens stand in front, for training and test time.

A prompt has one BOS, or none where neither tokenizer nor template writes one. A text that was rendered by a template
before brings its BOS along; then that of the tokenizer (or the template) is enough. What a tokenizer puts behind every
text (EOS with add_eos_token) is left out: a response follows there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_laser.data.chat import NO_OPTIONS, ChatOptions
from megatron_laser.errors import DataError

logger = logging.getLogger(__name__)

Chat = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids of one prompt. `bos_repeated`: its text brought the BOS along, and one of the two was left out."""

    token_ids: list[int]
    bos_repeated: bool = False


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[EncodedPrompt]:
    """Texts as they stand, behind the special tokens that the tokenizer adds by default (Llama's BOS), once each."""
    prefix, suffix = special_tokens_around(tokenizer)
    if suffix:
        _say_suffix(str(tokenizer.decode(suffix)))
    encoded = _encode(tokenizer, texts, special=True)
    return [_once(ids[: len(ids) - len(suffix)], prefix) for ids in encoded]


def encode_chats(
    tokenizer: Any, chats: Sequence[Chat], options: ChatOptions = NO_OPTIONS
) -> list[EncodedPrompt]:
    """Chats through the tokenizer's template, with the generation prompt. The template writes the special tokens.

    A message that begins with the BOS that the template writes, too, loses its own.

    Raises:
        DataError: the template does not parse, or refuses a chat (or its system prompt).
    """
    # Rendering and encoding apart: encoding a batch is many times faster, and what
    # apply_chat_template(tokenize=True) returns changed with transformers 5 (a BatchEncoding).
    chats = [options.messages(chat) for chat in chats]
    texts = [render_chat(tokenizer, chat, arguments=options.arguments) for chat in chats]
    encoded = _encode(tokenizer, texts, special=False)
    bos, _ = special_tokens_around(tokenizer)
    if not bos and getattr(tokenizer, "bos_token_id", None) is not None:
        bos = [int(tokenizer.bos_token_id)]
    if not bos:
        return [EncodedPrompt(ids) for ids in encoded]
    written = str(tokenizer.decode(bos))
    prompts = []
    for chat, ids in zip(chats, encoded, strict=True):
        bare = [_without(message, written) for message in chat]
        repeated = ids[: len(bos)] == bos and any(new != old for new, old in zip(bare, chat))
        if repeated:
            text = render_chat(tokenizer, bare, arguments=options.arguments)
            (ids,) = _encode(tokenizer, [text], special=False)
        once = _once(ids, bos)
        prompts.append(EncodedPrompt(once.token_ids, repeated or once.bos_repeated))
    return prompts


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts in front of every text and behind it by itself; [] for none."""
    with_special, alone = (_encode(tokenizer, ["1"], special=special)[0] for special in (True, False))
    for start in range(len(with_special) - len(alone) + 1):
        if with_special[start : start + len(alone)] == alone:
            return with_special[:start], with_special[start + len(alone) :]
    return [], []


@lru_cache(maxsize=8)  # once a process for each
def _say_suffix(text: str) -> None:
    logger.warning(
        "the tokenizer puts %r behind every text; prompts go without it, a response follows there", text
    )


def _encode(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    encoded = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    return [[int(token_id) for token_id in token_ids] for token_ids in encoded]


def _without(message: Mapping[str, Any], bos: str) -> Mapping[str, Any]:
    content = message["content"]
    while content.startswith(bos):
        content = content[len(bos) :]
    return {**message, "content": content}


def _once(token_ids: list[int], prefix: list[int]) -> EncodedPrompt:
    width, start = len(prefix), 0
    while (
        width and token_ids[start : start + width] == prefix == token_ids[start + width : start + 2 * width]
    ):
        start += width
    return EncodedPrompt(token_ids[start:], start > 0)


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    generation: bool = True,
    arguments: Mapping[str, Any] = NO_OPTIONS.arguments,
) -> str:
    """The text of a chat, with its special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: {"role", "content"} each.
        generation: end with what opens the assistant's answer.
        arguments: further variables of the template.

    Raises:
        DataError: the template does not parse, or refuses the messages; with the template's own reason and line.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, **arguments
        )
    except Exception as error:  # a template may raise anything: it is a program of its own
        where = f" (line {line})" if (line := getattr(error, "lineno", None)) else ""
        reason = " ".join(str(error).split()) or "no reason given"
        raise DataError(
            f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'} cannot render a chat: "
            f"{type(error).__name__}: {reason}{where}; mend chat_template.jinja (or chat_template in "
            "tokenizer_config.json), or set apply_chat_template to false"
        ) from error
    return str(text)
