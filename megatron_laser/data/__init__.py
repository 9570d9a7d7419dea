"""Data: files to rows, rows to tokenized prompts, and the order in which they are used. No torch."""

from .cursor import PromptCursor
from .encoding import encode_chats, encode_texts
from .errors import DataError
from .looks import heed, look_at_prompts, look_at_references
from .prompts import PromptReport, build_prompts
from .readers import Row, fingerprint, read_ids, read_records, read_rows
from .score_token import look_for_score_token, refuse_score_token
from .text import lone_surrogate

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
