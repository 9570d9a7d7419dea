"""The data files: rows, prompts within their length, and the tokens of readouts, which must not occur in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megatron_laser.config import RunConfig
from megatron_laser.config.derived import Source, data_sources
from megatron_laser.data import (
    Row,
    build_prompts,
    chat_options,
    prompt_findings,
    read_rows,
    reference_findings,
    score_tokens_in_data,
    unusable_findings,
)
from megatron_laser.data.epochs import epoch_words, with_steps
from megatron_laser.errors import Finding
from megatron_laser.rewards import answer_form, is_math_verify, may_want_row
from megatron_laser.run.preflight.finding_log import FindingLog, needed
from megatron_laser.run.preflight.model import ModelInputs
from megatron_laser.types import Prompt

GROUP = "Data"
SPLITS = ("train", "validation", "test")

Progress = Callable[[str, int, int], None]
"""Told the split, the rows that are tokenized, and how many there are."""


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source, and what messages call it."""

    source: Source
    rows: list[Row]
    setting: str


@dataclass
class DataInputs:
    """What was read, by split; a split that is not given, or could not be read, is not in it.

    rows, prompts: of all sources, one behind the other. sources: the rows of each.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)
    sources: dict[str, list[SourceRows]] = field(default_factory=dict)

    def examples(self) -> Iterator[tuple[str, Row]]:
        """(verifier, one of the rows that it is to judge), each verifier once."""
        seen = set()
        for part in (part for parts in self.sources.values() for part in parts):
            if part.source.reward not in seen:
                seen.add(part.source.reward)
                yield part.source.reward, part.rows[0]


def read_data(config: RunConfig, log: FindingLog) -> DataInputs:
    """The rows of all splits, and whether their references can equal a response."""
    found = DataInputs()
    data, own = config.data, [term.function for term in config.reward.terms.values() if term.function]
    for split in SPLITS:
        sources = data_sources(config, split)
        if not sources:
            continue
        parts: list[SourceRows] = []
        for source in sources:
            setting = f"data.{split}" + (f" source {source.name!r}" if source.name else "")
            with log.topic(GROUP, setting):
                rows = read_rows(
                    source.paths,
                    prompt_key=data.prompt_key,
                    answer_key=data.answer_key,
                    # A function of the user's gets the column as it is written, and may mean anything by it.
                    mathematics=is_math_verify(source.reward),
                    options_key=answer_form(source.reward).options_key,
                    first=sum(len(part.rows) for part in parts),
                    columns=any(map(may_want_row, (source.reward, *own))),
                )
                parts.append(SourceRows(source, rows, setting))
        if len(parts) < len(sources):
            continue
        found.sources[split] = parts
        found.rows[split] = [row for part in parts for row in part.rows]
        for part in parts:
            if is_math_verify(part.source.reward):
                with log.topic(GROUP, "references"):
                    log.add(GROUP, reference_findings(part.rows, name=part.setting))
            elif (unusable := answer_form(part.source.reward).unusable) is not None:
                with log.topic(GROUP, "references"):
                    log.add(GROUP, unusable_findings(part.rows, unusable, name=part.setting))
    return found


def tokenize_data(
    config: RunConfig, model: ModelInputs, found: DataInputs, log: FindingLog, progress: Progress
) -> None:
    """Tokenize every prompt: lengths, ids, and where tokens of readouts occur."""
    for split, rows in found.rows.items():
        with log.topic(GROUP, f"data.{split}"):
            _tokenize(config, model, found, split, log, progress)
        if split in found.prompts:
            prompts, tokens = found.prompts[split], model.readout_tokens
            with log.topic(GROUP, "score token"):
                log.add(
                    GROUP,
                    score_tokens_in_data(rows, prompts, model.tokenizer, tokens, name=f"data.{split}"),
                )


def epoch_findings(config: RunConfig, found: DataInputs) -> list[Finding]:
    """What `run.epochs` come to."""
    if config.run.steps_known or "train" not in found.prompts:
        return []
    settled = with_steps(config, len(found.prompts["train"]))
    text = epoch_words(config, settled.run.steps)
    return [Finding("run.epochs", "ok", f"{len(found.prompts['train'])} usable problems, {text}")]


def _tokenize(
    config: RunConfig, model: ModelInputs, found: DataInputs, split: str, log: FindingLog, progress: Progress
) -> None:
    total, data = len(found.rows[split]), config.data
    tokenizer = needed(model.tokenizer, "the tokenizer")
    needed(model.template or None, "the chat template")
    prompts: list[Prompt] = []
    for part in found.sources[split]:
        before = part.rows[0].row
        built, report = build_prompts(
            part.rows,
            tokenizer,
            prompt_suffix=data.prompt_suffix,
            apply_chat_template=data.apply_chat_template,
            max_prompt_tokens=data.max_prompt_tokens,
            vocab_size=needed(model.architecture, "config.json").vocab_size,
            options=chat_options(data),
            source=part.source.name,
            reward="" if part.source.reward == config.reward.function else part.source.reward,
            progress=lambda done, before=before: progress(split, before + done, total),  # type: ignore[misc]
            log=False,
        )
        prompts += built
        log.add(GROUP, prompt_findings(report, name=part.setting))
    found.prompts[split] = prompts
