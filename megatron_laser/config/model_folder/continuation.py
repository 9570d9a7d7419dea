"""The text that readouts put behind responses that were cut off (`position: {forced: text}`): its tokens, and the room
that they need behind the longest response.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path

from megatron_laser.config.derived import longest_sequence, micro_batch_tokens
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.readouts import forced_text
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.errors import ConfigError


def planned_ids(config: RunConfig) -> tuple[int, ...] | None:
    """What the text is as tokens, by tokenizer.json alone; None where the folder has none, () without a text.

    Raises:
        ConfigError: the file cannot be read.
    """
    text, file = forced_text(config), Path(config.model.path) / "tokenizer.json"
    if not text:
        return ()
    return _encode(str(file), file.stat().st_mtime_ns, text) if file.is_file() else None


@lru_cache(maxsize=8)
def _encode(file: str, changed: int, text: str) -> tuple[int, ...]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(file)
        tokenizer.no_padding()  # as transformers does; a file may have been saved with either
        tokenizer.no_truncation()
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)
    except Exception as error:  # of any kind: the file is parsed in Rust
        raise ConfigError([f"cannot be read as a tokenizer: {error}"], file) from error


def longest_trained(config: RunConfig) -> int:
    """Tokens of the longest sequence that goes through the trainer: prompt, response, and the text behind it.

    Without a tokenizer.json, which a dry run does not need, each byte of the text counts as a token: the most that
    tokenizers which fall back on bytes make of it.
    """
    ids = planned_ids(config)
    return longest_sequence(config) + (len(forced_text(config).encode()) if ids is None else len(ids))


def continuation_problems(
    config: RunConfig, architecture: Architecture, ids: Sequence[int], read: Collection[int]
) -> list[str]:
    """Why the text cannot stand behind a response; one line each.

    Args:
        ids: the text's. read: the ids of all readouts' tokens.
    """
    text = forced_text(config)
    if not text:
        return []
    where = f"laser.readouts: position forced {text!r}"
    if not ids:
        return [f"{where} is no token of the tokenizer; give a text that is, such as the end token's"]
    problems = []
    outside = [token for token in ids if not 0 <= token < architecture.vocab_size]
    if outside:
        problems.append(
            f"{where} has token id {outside[0]}, which is not in the model's vocabulary; expected 0 to "
            f"{architecture.vocab_size - 1}"
        )
    if shown := [token for token in ids if token in read]:
        problems.append(
            f"{where} has token id {shown[0]}, which a readout reads; the model would see what it is to predict: leave "
            "it out"
        )
    longest, more = longest_sequence(config), len(ids)
    limit, room = architecture.max_position_embeddings, micro_batch_tokens(config)
    words = (
        f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_new_tokens "
        f"{config.rollout.max_new_tokens} + {more} token{'s' if more > 1 else ''} of {where} = {longest + more}"
    )
    # Without the text it is said where lengths are looked at.
    if longest <= limit < longest + more:
        problems.append(
            f"{words} is more than the model's max_position_embeddings {limit}; use rollout.max_new_tokens "
            f"{config.rollout.max_new_tokens - (longest + more - limit)} or fewer, or a shorter text"
        )
    if longest <= room < longest + more:
        budget, context = config.batching.tokens_per_micro_batch, config.parallel.context
        product = f" x parallel.context {context} = {room}" if context > 1 else ""
        problems.append(
            f"batching.tokens_per_micro_batch: {budget}{product} is less than {words}; every sequence must fit: use "
            f"{-(-(longest + more) // context)} or more"
        )
    return problems
