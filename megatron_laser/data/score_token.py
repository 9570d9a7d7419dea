"""The score token must not occur in the data: z_c is what the model says about a response, never part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_laser.types import Prompt

from .errors import DataError
from .readers import Row

_BATCH = 1000  # texts for one call of the tokenizer


def refuse_score_token(
    rows: Sequence[Row], prompts: Sequence[Prompt], tokenizer: Any, score_token_id: int
) -> None:
    """Check every prompt, chat template included, and every reference answer.

    A prompt with z_c in it shows the model the token outside its one place behind EOS, and an answer with it is
    one that no response should give.

    Args:
        rows: as read; `prompts` are made from them and may leave some out.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        DataError: names the first row, and whether it is the prompt or the answer.
    """
    source = {row.row: row.source for row in rows}
    for prompt in prompts:
        if score_token_id in prompt.token_ids:
            raise DataError(_message(source[prompt.row], prompt.row, "prompt", tokenizer, score_token_id))
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        encoded = tokenizer([row.answer for row in batch], add_special_tokens=False)["input_ids"]
        for row, token_ids in zip(batch, encoded, strict=True):
            if score_token_id in token_ids:
                raise DataError(_message(row.source, row.row, "answer", tokenizer, score_token_id))


def _message(source: str, row: int, part: str, tokenizer: Any, score_token_id: int) -> str:
    return (
        f"{source} (row {row}): the {part} holds the score token {tokenizer.decode([score_token_id])!r} (id "
        f"{score_token_id}); choose a token for laser.score_token that is not in the data, or remove the row"
    )
