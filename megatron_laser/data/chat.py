"""What a chat template is given beside the problem: its arguments, and a system prompt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_laser.config.schema.inputs import DataConfig
from megatron_laser.errors import DataError

# The template gets these from the library, or from whoever renders.
_GIVEN = frozenset(["messages", "add_generation_prompt", "raise_exception", "strftime_now"])
_GENERATION_TAG = re.compile(
    r"{%-?\s*(?:end)?generation\s*-?%}"
)  # the library's own, which Jinja alone does not know


@dataclass(frozen=True)
class ChatOptions:
    """How chats are rendered.

    Attributes:
        arguments: variables of the template, such as enable_thinking.
        system_prompt: the first message of a chat that has none of its own; "": none.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str = ""

    def __bool__(self) -> bool:
        """Whether anything is given."""
        return bool(self.arguments or self.system_prompt)

    def messages(self, chat: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The chat behind the system prompt; a chat that brings one along keeps it."""
        if self.system_prompt and chat[0].get("role") not in ("system", "developer"):
            return [{"role": "system", "content": self.system_prompt}, *chat]
        return list(chat)


NO_OPTIONS = ChatOptions()


def chat_options(data: DataConfig) -> ChatOptions:
    """What a run's settings say."""
    return ChatOptions(data.chat_template_arguments, data.system_prompt or "")


def check_chat_options(tokenizer: Any, options: ChatOptions, *, section: str = "data") -> None:
    """Refuse arguments that the tokenizer's template does not use: they would change nothing, without a word.

    Args:
        section: of the settings that messages name.

    Raises:
        DataError: names the argument, and the variables that the template has.
    """
    if not options.arguments:
        return
    known = template_variables(tokenizer)
    for name in options.arguments:
        if known is None or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        has = f"its variables: {', '.join(sorted(known))}" if known else "it has no variables"
        raise DataError(
            f"{section}.chat_template_arguments: the chat template of "
            f"{getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'} does not use {name!r}{hint} ({has})"
        )


def template_variables(tokenizer: Any) -> set[str] | None:
    """Names that the chat template reads and does not set itself; None where that cannot be told.

    A template that does not parse is for rendering to refuse, with its line.
    """
    import jinja2
    import jinja2.meta

    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return None
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # parsed only, never rendered
    try:
        parsed = environment.parse(_GENERATION_TAG.sub("", template))
    except jinja2.TemplateError:
        return None
    special = set(getattr(tokenizer, "special_tokens_map", None) or {})
    return jinja2.meta.find_undeclared_variables(parsed) - _GIVEN - special - {"bos_token", "eos_token"}
