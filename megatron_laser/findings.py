"""What a check found, in words for a person. Imports nothing, so that every package may return findings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what was looked at, two or three words: "references", "end of sequence", "tied weights".
        level: ok (as it should be), note (worth knowing), warning (the run works, probably not as meant) or
            error (the run must not start).
        text: what was found, with counts; for an error also the setting, file or line.
        examples: a few offenders, each with its place (file:line, tensor name).
        cure: what to do; "" where there is nothing to do.
    """

    topic: str
    level: Level
    text: str
    examples: tuple[str, ...] = ()
    cure: str = ""

    @property
    def line(self) -> str:
        """Text, examples and cure in one line, for a log or an error's message."""
        examples = f" ({'; '.join(self.examples)})" if self.examples else ""
        return f"{self.text}{examples}{'; ' if self.cure else ''}{self.cure}"
