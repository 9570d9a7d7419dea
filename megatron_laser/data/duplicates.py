r"""Whether two problems are the same one, typeset differently: for repeats in a file and overlap with test files.

Only what cannot change a problem's meaning is taken away, since different problems that are called the same are lost
(or stop a file from being written), without anybody to notice:

- blanks, `$`, `\(`, `\)`, `\[`, `\]` and LaTeX spacing (`\,`, `\quad`, ...), except between digits (`1 2 3` is not
  `12 3`) and behind a command that is followed by a letter (`\in t` is not `\int`);
- `\left`, `\right`, `\big`, ... in front of a delimiter, not inside `\leftarrow`; `\dfrac` and `\tfrac` are `\frac`;
- the case of a sentence's first word (`Find` and `find`); never of variables (`N` and `n`) or of a command;
- superscript digits are written with `^` (`2²` is `2^2` and `2^{2}`, not `22`);
- quotes, dashes, minus signs and full-width characters have one form each.
"""

from __future__ import annotations

import re
import unicodedata

_SPACING = re.compile(
    r"(?P<row>\\\\)"  # a new row of a matrix or of cases: stays, and its second backslash begins no command
    r"|\\(?:left|right)\s*\.(?![0-9])"  # delimiters that are not drawn
    r"|\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])"
    r"|\\(?:displaystyle|textstyle|quad|qquad)(?![a-zA-Z])"
    r"|\\[,;:! ()\[\]]"
    r"|\\?\$"
)
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_POWER = re.compile(r"\^\s*\{\s*([0-9A-Za-z])\s*\}")
_FIRST_WORD = re.compile(r"(?:^|(?<=[.?!:]\s))\s*[A-Z](?=[a-z])")
_ONE_FORM = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    }
)
_BLANKS = re.compile(r"(?P<before>\\[a-zA-Z]+|[0-9]|)\s+(?=(?P<after>.?))", re.DOTALL)


def comparable(problem: str) -> str:
    """The problem in the form in which it is compared with others."""
    text = unicodedata.normalize("NFC", problem).translate(_ONE_FORM)
    text = _SUPERSCRIPTS.sub(lambda found: _power(found.group().translate(_DIGITS)), text)
    text = _SPACING.sub(lambda found: found["row"] or " ", text)
    text = _FRACTION.sub(r"\\frac", text)
    text = _POWER.sub(r"^\1", text)
    text = _FIRST_WORD.sub(lambda found: found.group().lower(), text.strip())
    return _BLANKS.sub(_blank, text)


def _power(digits: str) -> str:
    return f"^{digits}" if len(digits) == 1 else f"^{{{digits}}}"


def _blank(found: re.Match[str]) -> str:
    before, after = found["before"], found["after"]
    apart = after.isalpha() if before.startswith("\\") else before.isdigit() and after.isdigit()
    return before + (" " if apart else "")
