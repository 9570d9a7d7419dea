"""Rows to tokenized prompts: chat template or plain text, length limit, ids within the vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_laser.data.chat import NO_OPTIONS, ChatOptions, check_chat_options
from megatron_laser.data.encoding import encode_chats, encode_texts
from megatron_laser.data.readers import Row
from megatron_laser.data.surrogates import lone_surrogate
from megatron_laser.errors import DataError
from megatron_laser.types import Prompt

logger = logging.getLogger(__name__)

_BATCH = 1000  # texts for one call of the tokenizer
_NAMED = 5  # dropped rows that the log names


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What became of the rows: the prompts that were longer than the limit, all lengths, repeated BOS.

    Attributes:
        total: number of rows there were.
        max_prompt_tokens: the limit.
        rows: (where the row is, its prompt's length in tokens) of those that were dropped, in the order of the rows.
        section: of the settings that the limit is one of.
        lengths: in tokens, of every row's prompt, in the order of the rows.
        bos_repeated: where the rows are whose text brought a BOS along that was not needed.
    """

    total: int
    max_prompt_tokens: int
    rows: tuple[tuple[str, int], ...] = ()
    section: str = "data"
    lengths: tuple[int, ...] = ()
    bos_repeated: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = ", ".join(f"{source} ({length} tokens)" for source, length in self.rows[:_NAMED])
        more = f" and {len(self.rows) - _NAMED} more" if len(self.rows) > _NAMED else ""
        return (
            f"{len(self.rows)} of {self.total} prompts are longer than {self.section}.max_prompt_tokens = "
            f"{self.max_prompt_tokens} and dropped" + (f": {named}{more}" if named else "")
        )


def build_prompts(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    prompt_suffix: str,
    apply_chat_template: bool,
    max_prompt_tokens: int,
    vocab_size: int,
    section: str = "data",
    options: ChatOptions = NO_OPTIONS,
    source: str = "",
    reward: str = "",
    progress: Callable[[int], None] | None = None,
    log: bool = True,
) -> tuple[list[Prompt], PromptReport]:
    """Tokenize every row's problem followed by `prompt_suffix`.

    Args:
        rows: see `read_rows`.
        tokenizer: a Hugging Face tokenizer.
        prompt_suffix: appended to the problem as it is.
        apply_chat_template: one user turn, behind the row's earlier turns if it has any, through the tokenizer's
            template, with the generation prompt; else the text itself, with the special tokens that the tokenizer adds
            by default (Llama's BOS). A BOS that the text brings along is not doubled, and named in the log; see
            `encoding`.
        max_prompt_tokens: longer prompts are dropped, and named in the log.
        vocab_size: number of ids that the model has (before padding).
        section: of the settings that are named in messages.
        options: what the chat template is given besides.
        source, reward: of `types.Prompt`.
        progress: told after each batch how many rows are done.
        log: warn of prompts that are left out or mended; False where somebody looks at the report.

    Raises:
        DataError: the tokenizer has no chat template or one that does not use an argument, a row is a conversation and
            no template is applied, the suffix is no text, an id is not in the vocabulary, a prompt has no tokens, or no
            prompt is left.
    """
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{section}.apply_chat_template is true, but the tokenizer has no chat template: set "
            f"{section}.apply_chat_template: false (a base model), or add chat_template.jinja to the model's folder"
        )
    if apply_chat_template:
        check_chat_options(tokenizer, options, section=section)
    elif options:
        raise DataError(
            f"{section}.chat_template_arguments and {section}.system_prompt need {section}.apply_chat_template: true; "
            "without a template leave them out"
        )
    for name, text in (("prompt_suffix", prompt_suffix), ("system_prompt", options.system_prompt)):
        if broken := lone_surrogate(text):
            raise DataError(f"{section}.{name} holds {broken}")
    prompts: list[Prompt] = []
    dropped: list[tuple[str, int]] = []
    lengths: list[int] = []
    bos_repeated: list[str] = []
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        texts = [row.problem + prompt_suffix for row in batch]
        if apply_chat_template:
            chats = [(*row.turns, ("user", text)) for row, text in zip(batch, texts, strict=True)]
            encoded = encode_chats(
                tokenizer,
                [[{"role": role, "content": text} for role, text in chat] for chat in chats],
                options,
            )
        else:
            _check_plain(batch, section)
            encoded = encode_texts(tokenizer, texts)
        for row, one in zip(batch, encoded, strict=True):
            token_ids = one.token_ids
            _check_ids(token_ids, row, vocab_size)
            lengths.append(len(token_ids))
            if one.bos_repeated:
                bos_repeated.append(row.source)
            if len(token_ids) > max_prompt_tokens:
                dropped.append((row.source, len(token_ids)))
            else:
                prompts.append(
                    Prompt(
                        row.row,
                        row.problem,
                        row.answer,
                        token_ids,
                        source=source,
                        reward=reward,
                        columns=row.columns,
                    )
                )
        if progress is not None:
            progress(len(lengths))
    report = PromptReport(
        len(rows), max_prompt_tokens, tuple(dropped), section, tuple(lengths), tuple(bos_repeated)
    )
    if not prompts:
        raise DataError(f"no prompts are left: {report}" if rows else "no prompts: there are no rows")
    if dropped and log:
        logger.warning("%s", report)
    if bos_repeated and log:
        logger.warning(
            "%d of %d prompts bring the BOS along that the tokenizer or its template writes; one is left out: %s",
            len(bos_repeated),
            len(rows),
            ", ".join(bos_repeated[:_NAMED]) + (", ..." if len(bos_repeated) > _NAMED else ""),
        )
    return prompts, report


def _check_plain(rows: Sequence[Row], section: str) -> None:
    for row in rows:
        if row.turns:
            raise DataError(
                f"{row.source}: the problem is a conversation of {len(row.turns) + 1} turns, which needs a chat "
                f"template: set {section}.apply_chat_template: true, or write the problem as text"
            )


def _check_ids(token_ids: list[int], row: Row, vocab_size: int) -> None:
    if not token_ids:
        raise DataError(f"{row.source}: the prompt has no tokens")
    worst = max(token_ids) if min(token_ids) >= 0 else min(token_ids)
    if not 0 <= worst < vocab_size:
        raise DataError(
            f"{row.source}: token id {worst} is not in the model's vocabulary of {vocab_size}: "
            "the tokenizer belongs to another model"
        )
