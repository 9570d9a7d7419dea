"""What a user is told: errors that they can put right, and findings of a check. Imports nothing of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


class UserError(Exception):
    """Base of every error that the user can put right: their files, settings, servers or machine.

    The command line prints its message as one error without a traceback and exits with status 2. The message says
    what was wrong, where (file and line, setting and value) and what to do.
    """


class ConfigError(UserError, ValueError):
    """One or more problems of a run configuration, reported together.

    Attributes:
        problems: one line each; names the setting, its value, what was expected and what to do.
        source: the file (or folder) at fault, "" when there is none.
    """

    def __init__(self, problems: Sequence[str], source: str = "") -> None:
        if not problems:
            raise ValueError("a ConfigError needs at least one problem")
        self.problems = tuple(problems)
        self.source = source
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        head = f"{source}: {count} in the configuration" if source else f"{count} in the configuration"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in problems)]))


class ModelFolderError(UserError, ValueError):
    """A model folder whose files cannot be trained or run as they are; one line that names file or tensor."""


class DataError(UserError, ValueError):
    """A data file, a row, or the way they are read does not fit; the message names the place."""


class TestTimeError(UserError, ValueError):
    """An input or setting does not fit; names it, what was expected and what to do."""

    __test__ = False  # the name is not that of a test class


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
