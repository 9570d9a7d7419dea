"""A prompt as the user has it (text, chat or ids) to token ids."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from megatron_laser.data import NO_OPTIONS, ChatOptions, encode_chats, encode_texts, lone_surrogate
from megatron_laser.errors import TestTimeError

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant", "developer", "tool")


def prompt_token_ids(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    apply_chat_template: bool,
    prompt_suffix: str = "",
    options: ChatOptions = NO_OPTIONS,
) -> list[int]:
    """Token ids of the row's `prompt_ids` (as they are), `messages` or `prompt` (with one BOS, see `data.encoding`).

    Args:
        apply_chat_template: through the tokenizer's template, a plain prompt as one user message; False: the text
            itself, and a chat must be one user message.
        prompt_suffix: behind a plain prompt, and behind the last user message of a chat.
        options: what the template is given besides; a chat's own system message counts before its system prompt.

    Raises:
        TestTimeError: none or several of the three, or one that does not fit.
    """
    given = [name for name in ("prompt_ids", "messages", "prompt") if row.get(name) is not None]
    if len(given) != 1:
        raise TestTimeError(f"expected one of `prompt`, `messages` and `prompt_ids`, found {given or 'none'}")
    if given[0] == "prompt_ids":
        ids = row["prompt_ids"]
        if not isinstance(ids, list) or not ids or not all(type(item) is int for item in ids):
            raise TestTimeError("`prompt_ids`: expected a list of token ids")
        return ids
    if given[0] == "prompt":
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise TestTimeError("`prompt`: expected a text that is not empty")
        messages: list[dict[str, Any]] = [{"role": "user", "content": row["prompt"]}]
    else:
        messages = check_messages(row["messages"])
    if prompt_suffix:
        if messages[-1]["role"] != "user":
            raise TestTimeError("`messages`: the last one is not the user's, so the suffix has no place")
        last = {**messages[-1], "content": messages[-1]["content"] + prompt_suffix}
        messages = [*messages[:-1], last]
    if broken := lone_surrogate(messages, "messages"):
        raise TestTimeError(f"the {'prompt' if given[0] == 'prompt' else 'chat'} holds {broken}")
    if not apply_chat_template:
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise TestTimeError("`messages`: without a chat template expected exactly one user message")
        (encoded,) = encode_texts(tokenizer, [messages[0]["content"]])
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise TestTimeError("the tokenizer has no chat template; use --no-chat-template (a base model)")
        try:
            (encoded,) = encode_chats(tokenizer, [messages], options)
        except Exception as error:  # a template raises what it likes about the order of roles
            raise TestTimeError(f"`messages`: the chat template refuses them: {error}") from error
    if encoded.bos_repeated:
        _say_bos()
    return encoded.token_ids


@lru_cache(maxsize=1)
def _say_bos() -> None:
    """Once a process: a proxy's clients may all do it."""
    logger.warning("a prompt brings the BOS along that the tokenizer or its template writes; one is left out")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A chat: a list of {"role", "content"}, contents texts or OpenAI's lists of text parts.

    Raises:
        TestTimeError: names the message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TestTimeError("`messages`: expected a list of one message or more")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise TestTimeError(
                f"`messages[{index}]`: expected an object whose role is one of {', '.join(_ROLES)}"
            )
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            if len(parts) != len(content) or not all(isinstance(part, str) for part in parts):
                raise TestTimeError(f"`messages[{index}].content`: expected text only")
            content = "".join(str(part) for part in parts)
        if not isinstance(content, str):
            raise TestTimeError(f"`messages[{index}].content`: expected a text")
        checked.append({"role": message["role"], "content": content})
    if not any(message["content"].strip() for message in checked):
        raise TestTimeError("`messages`: every message is empty")
    return checked
