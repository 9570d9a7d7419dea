"""Data: files to rows, rows to tokenized prompts, and the order in which they are used. No torch."""

from .cursor import PromptCursor
from .errors import DataError
from .prompts import DroppedPrompts, build_prompts
from .readers import Row, fingerprint, read_ids, read_rows
from .score_token import refuse_score_token

__all__ = [
    "DataError",
    "DroppedPrompts",
    "PromptCursor",
    "Row",
    "build_prompts",
    "fingerprint",
    "read_ids",
    "read_rows",
    "refuse_score_token",
]
