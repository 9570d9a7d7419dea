"""Data: files to rows, rows to tokenized prompts, and the order in which they are used. No torch."""

from megatron_laser.data.cursor import PromptCursor
from megatron_laser.data.encoding import encode_chats, encode_texts
from megatron_laser.data.looks import heed, look_at_prompts, look_at_references
from megatron_laser.data.prompts import PromptReport, build_prompts
from megatron_laser.data.readers import Row, fingerprint, read_ids, read_records, read_rows
from megatron_laser.data.score_token import look_for_score_token, refuse_score_token
from megatron_laser.data.text import lone_surrogate
from megatron_laser.errors import DataError

__all__ = [
    "DataError",
    "PromptCursor",
    "PromptReport",
    "Row",
    "build_prompts",
    "encode_chats",
    "encode_texts",
    "fingerprint",
    "heed",
    "lone_surrogate",
    "look_at_prompts",
    "look_at_references",
    "look_for_score_token",
    "read_ids",
    "read_records",
    "read_rows",
    "refuse_score_token",
]
