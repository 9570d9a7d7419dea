"""What ends a response: the model's files, its tokenizer and its chat template each say it, and they need not agree.

A response that ends in none of the stop ids runs to its longest length, is counted as cut, and has no score: with the
wrong ids nothing of LaSeR is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_laser.config.model_folder.special_tokens import named_eos_ids
from megatron_laser.data.chat import NO_OPTIONS, ChatOptions
from megatron_laser.data.encoding import render_chat
from megatron_laser.errors import Finding, Level

TOPIC = "end of response"
_ANSWER = "forty-two apples"


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What the template writes behind an assistant's answer: its text, and its id where it is one special token."""

    text: str
    id: int | None


@dataclass(frozen=True, slots=True)
class EndSources:
    """What each says.

    Attributes:
        setting: `rollout.stop_token_ids`; () where it is null. name: what the user calls it.
        files: EOS ids by file name, in the order in which they count (`named_eos_ids`).
        tokenizer: id of the tokenizer's eos_token; None: it has none.
        turn_end: of the chat template, None without one or where it writes nothing there.
        template_used: prompts go through the template.
    """

    setting: tuple[int, ...] = ()
    name: str = "rollout.stop_token_ids"
    files: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tokenizer: int | None = None
    turn_end: TurnEnd | None = None
    template_used: bool = False

    @property
    def used(self) -> tuple[int, ...]:
        """The ids that end a response in the run."""
        return self.setting or next(iter(self.files.values()), ())


def end_sources(
    folder: str | Path,
    tokenizer: Any,
    *,
    setting: Sequence[int],
    template_used: bool,
    name: str = "rollout.stop_token_ids",
    options: ChatOptions = NO_OPTIONS,
) -> EndSources:
    """What the files of a model folder, its tokenizer and, where prompts go through it, its template say.

    Raises:
        ConfigError, DataError: a file, or the template, is broken.
    """
    return EndSources(
        setting=tuple(setting),
        name=name,
        files=named_eos_ids(folder),
        tokenizer=tokenizer.eos_token_id,
        turn_end=end_of_turn(tokenizer, options) if template_used else None,
        template_used=template_used,
    )


def end_of_turn(tokenizer: Any, options: ChatOptions = NO_OPTIONS) -> TurnEnd | None:
    """What the tokenizer's chat template writes behind an assistant's answer.

    Raises:
        DataError: the template cannot render an answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": _ANSWER}]
    text = render_chat(tokenizer, options.messages(chat), generation=False, arguments=options.arguments)
    _, found, rest = text.rpartition(_ANSWER)
    rest = rest.strip()
    if not found or not rest:
        return None
    first = tokenizer(rest, add_special_tokens=False)["input_ids"][0]
    special = first in tokenizer.all_special_ids or first in getattr(tokenizer, "added_tokens_decoder", {})
    if special:
        return TurnEnd(tokenizer.convert_ids_to_tokens(first), first)
    return TurnEnd(rest.split()[0], None)


def check_end_of_response(sources: EndSources, tokenizer: Any) -> Finding:
    """Whether what is used ends what the model was made to write.

    Args:
        sources: `used` must not be empty.
        tokenizer: names ids.
    """

    def name(token_id: int) -> str:
        token = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
        return f"{token_id} {token!r}" if token is not None else f"{token_id} (no token)"

    def names(ids: tuple[int, ...]) -> str:
        return ", ".join(name(token_id) for token_id in ids)

    used = sources.used
    said = [f"{file}: {names(ids)}" for file, ids in sources.files.items()]
    if sources.tokenizer is not None:
        said.append(f"tokenizer's eos_token: {name(sources.tokenizer)}")
    if sources.turn_end is not None:
        end = sources.turn_end
        said.append(f"template's end of turn: {end.text!r}, no special token" if end.id is None else
                    f"template's end of turn: {name(end.id)}")  # fmt: skip
    if sources.setting:
        said.insert(0, f"{sources.name}: {names(sources.setting)}")
    source = sources.name if sources.setting else next(iter(sources.files), "nothing")
    used_text = f"responses end at {names(used)} ({source})"
    trouble, missing = _trouble(sources, name)
    if not trouble:
        return Finding(TOPIC, "ok", used_text)
    level: Level = "note" if sources.setting and set(used) & {sources.tokenizer, missing} else "warning"
    cure = ""
    if missing is not None:
        wanted = [*used, missing] if missing not in used else list(used)
        cure = f"set {sources.name}: {wanted}"
    return Finding(TOPIC, level, f"{used_text}, but {trouble}", tuple(said), cure)


def _trouble(sources: EndSources, name: Any) -> tuple[str, int | None]:
    """(what does not fit, the id that is missing); ("", None) where all is well."""
    used, end = sources.used, sources.turn_end
    cut = "a response that ends there runs on to its longest length and has no score"
    if sources.template_used and end is not None:
        if end.id is None:
            return (
                f"the chat template ends a turn with {end.text!r}, which is no special token and cannot end a response",
                None,
            )
        if end.id not in used:
            return f"the chat template ends a turn with {name(end.id)}: {cut}", end.id
        return "", None
    if sources.tokenizer is not None and sources.tokenizer not in used:
        return f"the tokenizer's eos_token is {name(sources.tokenizer)}: {cut}", sources.tokenizer
    return "", None
