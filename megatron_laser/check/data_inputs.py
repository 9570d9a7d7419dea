"""The data files: rows, prompts within their length, and the score token, which must not occur in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_laser.check.ledger import Ledger, needed
from megatron_laser.check.model_inputs import ModelInputs
from megatron_laser.config import RunConfig
from megatron_laser.data import Row, build_prompts, read_rows, refuse_score_token
from megatron_laser.findings import Finding
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
    """The rows of all splits."""
    found = DataInputs()
    data = config.data
    for split in SPLITS:
        paths = getattr(data, split)
        if paths is not None:
            with ledger.topic(GROUP, f"{split} data"):
                found.rows[split] = read_rows(paths, prompt_key=data.prompt_key, answer_key=data.answer_key)
    return found


def look_at_data(
    config: RunConfig, model: ModelInputs, found: DataInputs, ledger: Ledger, progress: Progress
) -> None:
    """Tokenize every prompt: lengths, ids, and where the score token occurs."""
    for split, rows in found.rows.items():
        with ledger.topic(GROUP, f"{split} data"):
            _tokenize(config, model, found, split, ledger, progress)
        score = None if model.special is None else model.special.score_token_id
        if score is not None and split in found.prompts:
            with ledger.topic(GROUP, f"{split} data"):
                refuse_score_token(rows, found.prompts[split], model.tokenizer, score)


def _tokenize(
    config: RunConfig, model: ModelInputs, found: DataInputs, split: str, ledger: Ledger, progress: Progress
) -> None:
    rows, data = found.rows[split], config.data
    built, dropped = build_prompts(
        rows,
        needed(model.tokenizer, "the tokenizer"),
        prompt_suffix=data.prompt_suffix,
        apply_chat_template=data.apply_chat_template,
        max_prompt_tokens=data.max_prompt_tokens,
        vocab_size=needed(model.architecture, "config.json").vocab_size,
        progress=lambda done: progress(split, done, len(rows)),
    )
    found.prompts[split] = built
    ledger.add(GROUP, [_lengths(split, built, dropped)])


def _lengths(split: str, prompts: list[Prompt], dropped: Any) -> Finding:
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)
    median, longest = lengths[len(lengths) // 2], lengths[-1]
    topic = f"{split} data"
    text = f"{len(prompts):,} of {dropped.total:,} problems; prompts of {lengths[0]:,} to {longest:,} tokens, median {median:,}"
    if not dropped.rows:
        return Finding(topic, "ok", f"{text} (data.max_prompt_tokens {dropped.max_prompt_tokens:,})")
    worst = sorted(dropped.rows, key=lambda row: -row[1])
    return Finding(
        topic,
        "warning",
        f"{len(dropped.rows):,} of {dropped.total:,} prompts are longer than data.max_prompt_tokens = "
        f"{dropped.max_prompt_tokens:,} and left out; {text}",
        tuple(f"{source}: {length:,} tokens" for source, length in worst[:3]),
        f"raise data.max_prompt_tokens (the longest has {worst[0][1]:,}) where they should count",
    )
