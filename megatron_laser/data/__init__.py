"""Data: files to rows, rows to tokenized prompts, and the order in which they are used. No torch."""

from megatron_laser.data.chat import NO_OPTIONS, ChatOptions, chat_options, check_chat_options
from megatron_laser.data.cursor import Cursor, PromptCursor
from megatron_laser.data.encoding import encode_chats, encode_texts
from megatron_laser.data.findings import (
    log_warnings,
    prompt_findings,
    reference_findings,
    refuse_score_tokens,
    score_tokens_in_data,
    unusable_findings,
)
from megatron_laser.data.mixture import MixedCursor, MixedSource
from megatron_laser.data.prompts import PromptReport, build_prompts
from megatron_laser.data.readers import Row, fingerprint, read_ids, read_records, read_rows
from megatron_laser.data.surrogates import lone_surrogate
from megatron_laser.errors import DataError

__all__ = [
    "NO_OPTIONS",
    "ChatOptions",
    "Cursor",
    "DataError",
    "MixedCursor",
    "MixedSource",
    "PromptCursor",
    "PromptReport",
    "Row",
    "build_prompts",
    "chat_options",
    "check_chat_options",
    "encode_chats",
    "encode_texts",
    "fingerprint",
    "log_warnings",
    "lone_surrogate",
    "prompt_findings",
    "read_ids",
    "read_records",
    "read_rows",
    "reference_findings",
    "refuse_score_tokens",
    "score_tokens_in_data",
    "unusable_findings",
]
