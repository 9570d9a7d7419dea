"""The model folder: its shape, tokenizer, chat template, what ends a response, and the score token."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config import ConfigError, RunConfig, model_folder_findings, read_architecture
from megatron_laser.config.checks.layout import position_problems, split_problems
from megatron_laser.config.derived import longest_sequence
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.special_tokens import (
    ReadoutToken,
    ScoreToken,
    SpecialTokens,
    Vocabulary,
    read_vocabulary,
    resolve_score,
    resolve_stops,
)
from megatron_laser.data.chat import chat_options, check_chat_options
from megatron_laser.data.encoding import render_chat
from megatron_laser.data.end_of_response import check_end_of_response, end_sources
from megatron_laser.data.tokenizer import check_tokenizer_files
from megatron_laser.errors import Finding
from megatron_laser.run.preflight.finding_log import FindingLog, needed

GROUP = "Model"
_QUESTION = "Which 3 digits of 8271 add up to 17?"
_SHOWN = 200  # characters of a rendered prompt


@dataclass
class ModelInputs:
    """What was read of `model.path`; None where it could not be."""

    architecture: Architecture | None = None
    vocabulary: Vocabulary | None = None
    score_token: ScoreToken | None = None
    special: SpecialTokens | None = None
    readout_tokens: tuple[ReadoutToken, ...] = ()
    tokenizer: Any = None
    template: bool = False  # it can be used, or is not


def check_model(config: RunConfig, log: FindingLog) -> ModelInputs:
    """Shape, weights and special tokens, from config.json, the tokenizer's files and the weight files' headers."""
    found = ModelInputs()
    with log.topic(GROUP, "model"):
        if config.run.fake.weights:
            log.add(
                GROUP, [Finding("model", "ok", f"weights are made up, of the shape of {config.model.path}")]
            )
            found.architecture = read_architecture(config.model.path)
        else:
            log.add(GROUP, model_folder_findings(config.model.path, dtype=config.model.dtype))
        with suppress(ConfigError):  # said by now
            found.architecture = read_architecture(config.model.path)
    check_sizes(config, found, log)
    made_up = config.run.fake.responses  # then nobody reads or writes text
    stops: tuple[int, ...] | None = None
    with log.topic(GROUP, "end of response"):  # whether they end what the model writes is seen later
        stops = resolve_stops(config, needed(found.architecture, "config.json"), complete=not made_up)
    with log.topic(GROUP, "tokenizer"):
        needed(found.architecture, "config.json")
        if not made_up:
            check_tokenizer_files(config.model.path)
        found.vocabulary = read_vocabulary(Path(config.model.path))
    with log.topic(GROUP, "score token"):
        architecture = needed(found.architecture, "config.json")
        vocabulary = needed(found.vocabulary, "the tokenizer")
        found.score_token = resolve_score(
            config, architecture, stops or (), vocabulary=vocabulary, complete=not made_up
        )
        if made_up:
            stops, found.score_token = stand_ins(architecture, stops or (), found.score_token)
        log.add(GROUP, [score_token_finding(config, found.score_token)])
        found.special = None if stops is None else SpecialTokens(stops, found.score_token)
    return found


def stand_ins(
    architecture: Architecture, stops: tuple[int, ...], token: ScoreToken | None
) -> tuple[tuple[int, ...], ScoreToken | None]:
    """Ids for what the folder's files do not name, where only the shapes of a step matter: the last ones."""
    last = architecture.vocab_size - 1
    stops = stops or (last,)
    if token is None or token.id is not None:
        return stops, token
    free = next(one for one in range(last, -1, -1) if one not in stops)
    return stops, ScoreToken(free, token.text, False, "made up, as its responses are")


def check_sizes(config: RunConfig, found: ModelInputs, log: FindingLog) -> None:
    """Whether the model has positions for the longest sequence, and can be split as `parallel` says."""
    with log.topic(GROUP, "lengths"):
        architecture = needed(found.architecture, "config.json")
        if problems := position_problems(config, architecture):
            raise ConfigError(problems)
        longest, limit = longest_sequence(config), architecture.max_position_embeddings
        text = (
            f"a prompt and its response are at most {longest:,} tokens, and the model has {limit:,} positions"
        )
        log.add(GROUP, [Finding("lengths", "ok", text)])
    with log.topic(GROUP, "layout"):
        parallel = config.parallel
        if problems := split_problems(config, needed(found.architecture, "config.json")):
            raise ConfigError(problems)
        text = f"parallel.tensor {parallel.tensor} and parallel.pipeline {parallel.pipeline} divide the model"
        if parallel.context > 1:
            text += f"; parallel.context {parallel.context} ranks share each sequence"
        log.add(GROUP, [Finding("layout", "ok", text)])


def check_tokenizer(config: RunConfig, found: ModelInputs, log: FindingLog) -> None:
    """Its vocabulary, the chat template, and what ends a response; needs `found.tokenizer`."""
    with log.topic(GROUP, "tokenizer"):
        tokenizer = needed(found.tokenizer, "the tokenizer")
        log.add(GROUP, [vocabulary_finding(tokenizer, needed(found.architecture, "config.json").vocab_size)])
    with log.topic(GROUP, "chat template"):
        tokenizer = needed(found.tokenizer, "the tokenizer")
        finding = template_finding(config, tokenizer)
        found.template = finding.level != "error"
        log.add(GROUP, [finding])
    with log.topic(GROUP, "end of response"):
        tokenizer = needed(found.tokenizer, "the tokenizer")
        needed(found.special, "the ids that end a response")
        needed(found.template or None, "the chat template")
        sources = end_sources(
            config.model.path,
            tokenizer,
            setting=config.rollout.stop_token_ids or (),
            template_used=config.data.apply_chat_template,
            options=chat_options(config.data),
        )
        log.add(GROUP, [check_end_of_response(sources, tokenizer)])


def vocabulary_finding(tokenizer: Any, vocab_size: int) -> Finding:
    """Whether the model has a row for every token.

    Args:
        tokenizer: a Hugging Face tokenizer.
        vocab_size: rows of the model's embedding.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((token_id, text) for text, token_id in vocabulary.items() if token_id >= vocab_size)
    roles = {
        role: token_id
        for role in ("bos", "eos", "pad", "unk")
        if (token_id := getattr(tokenizer, f"{role}_token_id", None)) is not None
    }
    special = ", ".join(
        f"{role} {token_id} {getattr(tokenizer, f'{role}_token')!r}" for role, token_id in roles.items()
    )
    text = f"{len(vocabulary):,} tokens for {vocab_size:,} rows; {special or 'no special tokens'}"
    if not beyond:
        return Finding("tokenizer", "ok", text)
    roles_beyond = [role for role, token_id in roles.items() if token_id >= vocab_size]
    return Finding(
        "tokenizer",
        "error" if "bos" in roles_beyond or "eos" in roles_beyond else "warning",
        f"{len(beyond):,} tokens are beyond the model's vocabulary of {vocab_size:,}"
        + (
            f", {' and '.join(roles_beyond)} among them"
            if roles_beyond
            else "; a prompt with one of them is refused"
        ),
        tuple(f"{token_id} {token!r}" for token_id, token in beyond[:5]),
        "copy the tokenizer's files from the model's origin",
    )


def template_finding(config: RunConfig, tokenizer: Any) -> Finding:
    """Whether the chat template makes a prompt of a problem.

    Raises:
        DataError: it does not parse, refuses a user's message or a system prompt, or does not use an argument.
    """
    topic = "chat template"
    has = bool(getattr(tokenizer, "chat_template", None))
    if not config.data.apply_chat_template:
        there = "; the tokenizer has one" if has else ""
        return Finding(topic, "ok", f"not used (data.apply_chat_template is false){there}")
    if not has:
        return Finding(
            topic,
            "error",
            "data.apply_chat_template is true, but the tokenizer has no chat template",
            cure="set data.apply_chat_template: false (a base model), or add chat_template.jinja to the model's folder",
        )
    options = chat_options(config.data)
    check_chat_options(tokenizer, options)
    chat = options.messages([{"role": "user", "content": _QUESTION}])
    text = render_chat(tokenizer, chat, arguments=options.arguments)
    if options.system_prompt.strip() not in text:
        return Finding(
            topic, "error", "data.system_prompt is not in what the template renders", (repr(text[:_SHOWN]),),
            "mend chat_template.jinja, or put the text into data.prompt_suffix",
        )  # fmt: skip
    if _QUESTION not in text:
        return Finding(
            topic, "error", "the problem's text is not in what the template renders", (repr(text[:_SHOWN]),),
            "mend chat_template.jinja, or set data.apply_chat_template: false",
        )  # fmt: skip
    if text == render_chat(tokenizer, chat, generation=False, arguments=options.arguments):
        return Finding(
            topic, "warning", "a prompt does not open the assistant's turn: the template ignores add_generation_prompt",
            (repr(text[:_SHOWN]),), "mend chat_template.jinja, so that the model answers and does not go on asking",
        )  # fmt: skip
    return Finding(topic, "ok", f"a prompt is {text[:_SHOWN]!r}")


def score_token_finding(config: RunConfig, token: ScoreToken | None) -> Finding:
    """What the score token came to; that it can be used is known by now."""
    topic = "score token"
    if not config.laser.enabled:
        return Finding(topic, "ok", "none is needed (laser.enabled is false)")
    if token is None:
        return Finding(topic, "error", "laser.score_token is null", cure="name an unused special token")
    text = f"{token.text!r}, id {token.id}" if token.text is not None else f"id {token.id}"
    if not token.verified:
        return Finding(
            topic, "warning", f"{text} is unverified: {token.note}",
            cure="look whether the model's folder is complete; `megatron-laser calibrate` proposes tokens",
        )  # fmt: skip
    if token.note:
        return Finding(
            topic, "warning", f"{text} is {token.note}",
            cure="take a special token that nothing uses; `megatron-laser calibrate` proposes some",
        )  # fmt: skip
    return Finding(topic, "ok", f"{text}, a special token that ends no response")
