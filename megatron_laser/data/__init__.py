"""Data: files to rows, rows to tokenized prompts, and the order in which they are used. No torch."""

from .cursor import PromptCursor
from .errors import DataError
from .looks import look_at_prompts, look_at_references
from .prompts import PromptReport, build_prompts
from .readers import Row, fingerprint, read_ids, read_rows
from .references import grades_mathematics
from .score_token import look_for_score_token, refuse_score_token

__all__ = [
    "DataError",
    "PromptCursor",
    "PromptReport",
    "Row",
    "build_prompts",
    "fingerprint",
    "grades_mathematics",
    "look_at_prompts",
    "look_at_references",
    "look_for_score_token",
    "read_ids",
    "read_rows",
    "refuse_score_token",
]
