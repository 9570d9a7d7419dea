"""The score token must not occur in the data: z_c is what the model says about a response, never part of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_laser.data.readers import Row
from megatron_laser.errors import DataError, Finding
from megatron_laser.types import Prompt

_BATCH = 1000  # texts for one call of the tokenizer
_NAMED = 3


def look_for_score_token(
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    tokenizer: Any,
    score_token_id: int,
    *,
    name: str = "data.train",
) -> Finding:
    """Whether any prompt, chat template included, or any reference answer holds the score token.

    A prompt with z_c in it shows the model the token outside its one place behind EOS, and an answer with it is
    one that no response should give.

    Args:
        rows: as read; `prompts` are made from them and may leave some out.
        tokenizer: a Hugging Face tokenizer.
        name: of the setting with the files.
    """
    found = list(_places(rows, prompts, tokenizer, score_token_id))
    token = f"the score token {tokenizer.decode([score_token_id])!r} (id {score_token_id})"
    if not found:
        return Finding("score token", "ok", f"{name}: no prompt and no answer holds {token}")
    return Finding(
        "score token",
        "error",
        f"{name}: {len(found)} prompts or answers of {len(rows)} rows hold {token}",
        tuple(found[:_NAMED]),
        "choose a token for laser.score_token that is not in the data, or remove these rows",
    )


def refuse_score_token(
    rows: Sequence[Row], prompts: Sequence[Prompt], tokenizer: Any, score_token_id: int
) -> None:
    """Raises DataError where `look_for_score_token` finds any."""
    finding = look_for_score_token(rows, prompts, tokenizer, score_token_id, name="the data")
    if finding.level == "error":
        raise DataError(finding.line)


def _places(
    rows: Sequence[Row], prompts: Sequence[Prompt], tokenizer: Any, score_token_id: int
) -> Iterator[str]:
    source = {row.row: row.source for row in rows}
    for prompt in prompts:
        if score_token_id in prompt.token_ids:
            yield f"{source[prompt.row]}: the prompt"
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        encoded = tokenizer([row.answer for row in batch], add_special_tokens=False)["input_ids"]
        for row, token_ids in zip(batch, encoded, strict=True):
            if score_token_id in token_ids:
                yield f"{row.source}: the answer"
