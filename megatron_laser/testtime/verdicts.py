"""Prompted verification: the prompt that asks for a verdict on a response, and the verdict in what the model says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_laser.errors import TestTimeError

DEFAULT_TEMPLATE = """\
Below are a problem and a proposed solution. Decide whether the final answer of the solution is correct.

Problem:
{problem}

Proposed solution:
{response}

Check the solution step by step. Then put your verdict within \\boxed{}: \\boxed{Yes} if its final answer is correct, \
\\boxed{No} if it is wrong or missing."""
RIGHT_PATTERN = r"\\boxed\s*\{\s*(?:\\text\s*\{\s*)?(?:yes|correct|right|true)\b"
WRONG_PATTERN = r"\\boxed\s*\{\s*(?:\\text\s*\{\s*)?(?:no|incorrect|wrong|false)\b"
_HOLES = ("{problem}", "{response}")


@dataclass(frozen=True, slots=True)
class VerdictForm:
    """How a verdict is asked for and read.

    Attributes:
        template: with {problem} and {response}, each once or more; other braces are text.
        right, wrong: regular expressions, whatever the case of letters. Of all that they find the last one counts.
    """

    template: str = DEFAULT_TEMPLATE
    right: str = RIGHT_PATTERN
    wrong: str = WRONG_PATTERN

    def __post_init__(self) -> None:
        """Refuse what cannot work: a hole that is missing, an expression that is none."""
        for hole in _HOLES:
            if hole not in self.template:
                raise TestTimeError(f"the template has no {hole}; expected both {' and '.join(_HOLES)} in it")
        for name, pattern in (("--right-pattern", self.right), ("--wrong-pattern", self.wrong)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise TestTimeError(f"{name} {pattern!r} is no regular expression: {error}") from error

    def prompt(self, problem: str, response: str) -> str:
        """The template with both filled in; a problem that spells a hole stays what it is."""
        texts = dict(zip(_HOLES, (problem, response), strict=True))
        return re.sub("|".join(map(re.escape, _HOLES)), lambda found: texts[found[0]], self.template)

    def read(self, text: str) -> bool | None:
        """True: the response is called right; False: wrong; None: the text says neither."""
        ends = {
            verdict: max((found.end() for found in re.finditer(pattern, text, re.IGNORECASE)), default=-1)
            for verdict, pattern in ((True, self.right), (False, self.wrong))
        }
        if ends[True] == ends[False]:
            return None
        return ends[True] > ends[False]


def read_template(path: Path | None) -> str:
    """The file's text, or the default.

    Raises:
        TestTimeError: it cannot be read.
    """
    if path is None:
        return DEFAULT_TEMPLATE
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TestTimeError(f"--template {path}: {error}") from error


def share_right(verdicts: Sequence[bool | None]) -> float | None:
    """The share of "right" among the verdicts that can be read; None where none can."""
    told = [verdict for verdict in verdicts if verdict is not None]
    return sum(told) / len(told) if told else None
