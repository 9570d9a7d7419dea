"""The data files: rows, prompts within their length, and the score token, which must not occur in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_laser.config import RunConfig
from megatron_laser.data import (
    Row,
    build_prompts,
    look_at_prompts,
    look_at_references,
    look_for_score_token,
    read_rows,
)
from megatron_laser.rewards import is_math_verify
from megatron_laser.run.preflight.ledger import Ledger, needed
from megatron_laser.run.preflight.model_inputs import ModelInputs
from megatron_laser.types import Prompt

GROUP = "Data"
SPLITS = ("train", "validation", "test")

Progress = Callable[[str, int, int], None]
"""Told the split, the rows that are tokenized, and how many there are."""


@dataclass
class DataInputs:
    """What was read, by split; a split that is not given, or could not be read, is not in it."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)


def read_data(config: RunConfig, ledger: Ledger) -> DataInputs:
    """The rows of all splits, and whether their references can equal a response."""
    found = DataInputs()
    data = config.data
    # A function of the user's gets the column as it is written, and may mean anything by it.
    mathematics = is_math_verify(config.reward.function)
    for split in SPLITS:
        paths = getattr(data, split)
        if paths is None:
            continue
        with ledger.topic(GROUP, f"data.{split}"):
            found.rows[split] = read_rows(
                paths, prompt_key=data.prompt_key, answer_key=data.answer_key, mathematics=mathematics
            )
        if mathematics and split in found.rows:
            with ledger.topic(GROUP, "references"):
                ledger.add(GROUP, look_at_references(found.rows[split], name=f"data.{split}"))
    return found


def look_at_data(
    config: RunConfig, model: ModelInputs, found: DataInputs, ledger: Ledger, progress: Progress
) -> None:
    """Tokenize every prompt: lengths, ids, and where the score token occurs."""
    for split, rows in found.rows.items():
        with ledger.topic(GROUP, f"data.{split}"):
            _tokenize(config, model, found, split, ledger, progress)
        score = None if model.score_token is None else model.score_token.id
        if score is not None and split in found.prompts:
            prompts = found.prompts[split]
            with ledger.topic(GROUP, "score token"):
                finding = look_for_score_token(rows, prompts, model.tokenizer, score, name=f"data.{split}")
                ledger.add(GROUP, [finding])


def _tokenize(
    config: RunConfig, model: ModelInputs, found: DataInputs, split: str, ledger: Ledger, progress: Progress
) -> None:
    rows, data = found.rows[split], config.data
    tokenizer = needed(model.tokenizer, "the tokenizer")
    needed(model.template or None, "the chat template")
    built, report = build_prompts(
        rows,
        tokenizer,
        prompt_suffix=data.prompt_suffix,
        apply_chat_template=data.apply_chat_template,
        max_prompt_tokens=data.max_prompt_tokens,
        vocab_size=needed(model.architecture, "config.json").vocab_size,
        progress=lambda done: progress(split, done, len(rows)),
        log=False,
    )
    found.prompts[split] = built
    ledger.add(GROUP, look_at_prompts(report, name=f"data.{split}"))
