"""Chats through a tokenizer's template: code that came with the model, so whatever it raises is said in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import DataError


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, generation: bool = True) -> str:
    """The text of a chat, with its special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: {"role", "content"} each.
        generation: end with what opens the assistant's answer.

    Raises:
        DataError: the template does not parse, or refuses the messages; with the template's own reason and line.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a template may raise anything: it is a program of its own
        where = f" (line {line})" if (line := getattr(error, "lineno", None)) else ""
        reason = " ".join(str(error).split()) or "no reason given"
        raise DataError(
            f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'} cannot render a chat: "
            f"{type(error).__name__}: {reason}{where}; mend chat_template.jinja (or chat_template in "
            "tokenizer_config.json), or set apply_chat_template to false"
        ) from error
    return str(text)
