"""Reference answers as the mathematical grader needs them: taken out of worked solutions, lists and number columns.

Known forms are extracted, everything else is left as it stands. Only what `math_verify` grades passes through here: a
reward function of the user's own gets the column as it is written (`as_written`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from megatron_laser.rewards.mathematics.boxed import (
    behind_hashes,
    extract_answer,
    find_last_box,
    normalize_answer,
)

HASHES = "a worked solution's end (####)"
BOX = r"a worked solution's \boxed{}"
LIST = "a list of one answer"
EXPONENT = "a number written with an exponent"

_EXPONENT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]{1,9}")
_LONGEST_NUMBER = 60  # digits; longer ones are written as m \times 10^{e}
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+")
_DISPLAY = re.compile(r"^\s*(?:\$\$?|\\\[)|(?:\$\$?|\\\])\s*$")
_WORD = re.compile(r"[^\W\d_]{2,}")
_PROSE = 6  # words that make a sentence of an answer; "no real solutions" and "x = 5 or x = 6" are none
_NOTHING = ("n/a", "nan", "null", "?")


@dataclass(frozen=True, slots=True)
class Reference:
    """What a row's answer column holds.

    Attributes:
        text: for the grader; "" where the value is none that it can use.
        taken_from: the form that it was taken out of, "" for one that stands as it is.
    """

    text: str
    taken_from: str = ""


def read_reference(value: Any) -> Reference:
    r"""The answer in a known form: text, a number, a list of one, a solution ending in `#### 827` or with a box.

    Args:
        value: what JSON or Parquet gave. Numbers are written out without an exponent, 204.0 as 204, decimals without
            trailing zeros.

    Returns:
        `text` is "" for null, true and false, objects, empty text, numbers that are not finite and lists of several.
    """
    if isinstance(value, str):
        return _from_text(value.strip())
    if isinstance(value, list):
        inner = read_reference(value[0]).text if len(value) == 1 else ""
        return Reference(inner, LIST if inner else "")
    return Reference(number_text(value) or "")


def as_written(value: Any) -> str | None:
    """The answer for a reward function of the user's own: text untouched, anything else as JSON. None for null."""
    if value is None or isinstance(value, str):
        return value
    number = number_text(value)
    return json.dumps(value, ensure_ascii=False, default=_json) if number is None else number


def number_text(value: Any) -> str | None:
    r"""A number in digits: 1e-07 as 0.0000001, 2.50 as 2.5; None for what is no finite number.

    A float is the shortest decimal that reads back as it. Numbers of more than 60 digits become m \times 10^{e}.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    if isinstance(value, int):
        return str(value)
    number = Decimal(repr(value)) if isinstance(value, float) else value
    if not number.is_finite():
        return None
    if number == 0:
        return "0"
    sign, digits, exponent = number.as_tuple()
    figures = "".join(map(str, digits)).lstrip("0")
    shorter = figures.rstrip("0")
    exponent = int(exponent) + len(figures) - len(shorter)
    if max(len(shorter), len(shorter) + exponent, -exponent) > _LONGEST_NUMBER:
        power = exponent + len(shorter) - 1
        text = f"{shorter[0]}{'.' if shorter[1:] else ''}{shorter[1:]} \\times 10^{{{power}}}"
    elif exponent >= 0:
        text = shorter + "0" * exponent
    else:
        padded = shorter.rjust(1 - exponent, "0")
        text = f"{padded[:exponent]}.{padded[exponent:]}"
    return f"-{text}" if sign else text


def why_unequal(reference: str) -> str:
    """Why no response, or only one with the very same sentence, can equal this reference; "" where one can."""
    if reference.strip().casefold() in _NOTHING:
        return "a placeholder"
    if _has_several_lines(reference):
        return "several lines"
    if len(_WORD.findall(_COMMAND.sub(" ", reference))) >= _PROSE:
        return "prose"
    if extract_answer(f"\\boxed{{{reference}}}") != normalize_answer(reference):
        return "text that no box can hold (braces that do not match, or too long)"
    return ""


def _has_several_lines(reference: str) -> bool:
    """Whether a line ends where an answer might, too: not inside brackets, nor behind an operator or a comma."""
    text = _DISPLAY.sub("", reference).strip()
    if "\\begin" in text:
        return False
    read = ""
    for line in text.splitlines()[:-1]:
        read += line
        inside = any(read.count(opening) > read.count(closing) for opening, closing in ("()", "[]", "{}"))
        if not inside and not line.rstrip().endswith(("+", "-", "*", "=", ",", ";", "\\\\")):
            return True
    return False


def _from_text(text: str) -> Reference:
    ending = behind_hashes(text)
    if ending != text:
        return Reference(_from_text(ending).text, HASHES)
    box = find_last_box(text)
    if box.state == "found":
        return Reference(box.content, BOX if text.strip("$. ") != f"\\boxed{{{box.content}}}" else "")
    if text.startswith("[") and text.endswith("]") and text[1:].lstrip()[:1] in ("'", '"'):
        return _from_list_in_text(text)
    if _EXPONENT.fullmatch(text):
        return Reference(number_text(Decimal(text)) or "", EXPONENT)
    return Reference(text)


def _from_list_in_text(text: str) -> Reference:
    """`["34"]` and `['34']`: lists that a table without a list type made text of."""
    quote = text[1:].lstrip()[0]
    inner = text[1:-1].strip()
    if len(inner) < 2 or inner[-1] != quote or quote in inner[1:-1]:
        return Reference(text)  # several answers, or no list at all
    content = inner[1:-1].replace("\\\\", "\\")  # as JSON and Python write a backslash, if they wrote it
    return Reference(_from_text(content.strip()).text, LIST)


def _json(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else str(value)
