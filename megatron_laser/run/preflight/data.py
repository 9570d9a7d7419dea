"""The data files: rows, prompts within their length, and the score token, which must not occur in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_laser.config import RunConfig
from megatron_laser.data import (
    Row,
    build_prompts,
    prompt_findings,
    read_rows,
    reference_findings,
    score_token_in_data,
)
from megatron_laser.rewards import is_math_verify
from megatron_laser.run.preflight.finding_log import FindingLog, needed
from megatron_laser.run.preflight.model import ModelInputs
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


def read_data(config: RunConfig, log: FindingLog) -> DataInputs:
    """The rows of all splits, and whether their references can equal a response."""
    found = DataInputs()
    data = config.data
    # A function of the user's gets the column as it is written, and may mean anything by it.
    mathematics = is_math_verify(config.reward.function)
    for split in SPLITS:
        paths = getattr(data, split)
        if paths is None:
            continue
        with log.topic(GROUP, f"data.{split}"):
            found.rows[split] = read_rows(
                paths, prompt_key=data.prompt_key, answer_key=data.answer_key, mathematics=mathematics
            )
        if mathematics and split in found.rows:
            with log.topic(GROUP, "references"):
                log.add(GROUP, reference_findings(found.rows[split], name=f"data.{split}"))
    return found


def tokenize_data(
    config: RunConfig, model: ModelInputs, found: DataInputs, log: FindingLog, progress: Progress
) -> None:
    """Tokenize every prompt: lengths, ids, and where the score token occurs."""
    for split, rows in found.rows.items():
        with log.topic(GROUP, f"data.{split}"):
            _tokenize(config, model, found, split, log, progress)
        score = None if model.score_token is None else model.score_token.id
        if score is not None and split in found.prompts:
            prompts = found.prompts[split]
            with log.topic(GROUP, "score token"):
                finding = score_token_in_data(rows, prompts, model.tokenizer, score, name=f"data.{split}")
                log.add(GROUP, [finding])


def _tokenize(
    config: RunConfig, model: ModelInputs, found: DataInputs, split: str, log: FindingLog, progress: Progress
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
    log.add(GROUP, prompt_findings(report, name=f"data.{split}"))
