r"""Multiple choice: `multiple_choice` reads the option that a response names, by its letter or by its text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_laser.rewards.general.short_text import text_form
from megatron_laser.rewards.general.stated import stated_answer, unwrapped
from megatron_laser.rewards.grade import Grade
from megatron_laser.rewards.mathematics.boxed import gold_answer
from megatron_laser.rewards.mathematics.grading import CORRECT, NO_ANSWER, UNPARSABLE, WRONG

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKS = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ]|\\\(|\\\)|\\\[|\\\]|[$*_`\"']")
_LETTER = re.compile(
    r"(?:(?:option|choice|answer|letter)\s*:?\s*)?"
    r"(?:[(\[]\s*(?P<inside>[A-Za-z])\s*[)\]]|(?P<bare>[A-Za-z]))"
    r"(?P<end>\s*$|\s*[).:\],]+|\s*-(?=\s)|(?=\s+(?:because|since|as|which|is|with)\b)|(?<=[)\]])\s)"
    r"(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_SEPARATOR = re.compile(r"\s*(?:[,;/&+|]|\\&|and\b|or\b)+\s*(?:and\b|or\b)?\s*", re.IGNORECASE)
_ANOTHER = re.compile(r"\s*(?:option\s+)?(?:[(\[]\s*[A-Za-z]\s*[)\]]|[A-Z](?:\s*$|\s*[.,;:)\]]))")


@dataclass(frozen=True, slots=True)
class ChoiceReference:
    """The right option: its letter ("" where only its text is known), its text ("" where that is not), all texts."""

    letter: str
    text: str
    options: tuple[str, ...]


def multiple_choice(response: str, answer: str) -> Grade:
    r"""Right where the response ends in the right option: its letter, or its text where the options are known.

    Args:
        response: the model's text; its answer is the last \boxed{}, or what follows its last "the answer is".
        answer: see `read_choice`.

    Raises:
        ValueError: the reference cannot be read.
    """
    reference = read_choice(answer)
    stated = stated_answer(response)
    if stated.state == "none":
        return NO_ANSWER
    choice = _choice(stated.content, reference.options) if stated.state == "found" else None
    if choice is None:
        return UNPARSABLE
    letter, text = choice
    if reference.letter and letter:
        return CORRECT if letter == reference.letter else WRONG
    # a letter can be compared with a letter only, and a text with a text
    right = not reference.letter and not letter and text == text_form(reference.text)
    return CORRECT if right else WRONG


@lru_cache(maxsize=8192)
def read_choice(answer: str) -> ChoiceReference:
    """The reference of a multiple-choice question.

    It is a letter (`C`, `(C)`, `C. Paris`), or the option's text, or a JSON object with `answer` (a letter, the
    option's number from 0, or its text) and `options`, a list of texts or an object of letter -> text.

    Raises:
        ValueError: it is empty or no such object, or its answer is none of its options.
    """
    text = answer.strip()
    if not text:
        raise ValueError("the reference is empty")
    if text.startswith("{") and text.endswith("}"):
        return _with_options(text)
    text = gold_answer(text)
    letter, _ = _letter(text) or ("", "")
    return ChoiceReference(letter, "" if letter else text, ())


def unusable_choice(answer: str) -> str:
    """Why no response can be right for this reference; "" where one can."""
    try:
        read_choice(answer)
    except ValueError as error:
        return str(error)
    return ""


def extract_choice(response: str, answer: str) -> str | None:
    """The letter (or, without one, the text) that a response ends in, for votes among responses to one question."""
    stated = stated_answer(response)
    try:
        options = read_choice(answer).options
    except ValueError:
        options = ()
    choice = _choice(stated.content, options) if stated.state == "found" else None
    return (choice[0] or choice[1] or None) if choice is not None else None


def _with_options(text: str) -> ChoiceReference:
    try:
        value = json.loads(text)
        options, right = value["options"], value["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected a JSON object with `answer` and `options` ({error})") from None
    if isinstance(options, dict):
        if sorted(map(str.upper, options)) != list(LETTERS[: len(options)]):
            raise ValueError(f"options {', '.join(options)}: expected the letters from A on")
        options = [options[letter] for letter in sorted(options, key=str.upper)]
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"`options` is {options!r:.60}; expected 2 to {len(LETTERS)} texts")
    texts = tuple(option if isinstance(option, str) else str(option) for option in options)
    place = _place(right, texts)
    if place is None:
        raise ValueError(f"the answer {right!r:.60} is none of the {len(texts)} options")
    return ChoiceReference(LETTERS[place], texts[place], texts)


def _place(right: Any, options: tuple[str, ...]) -> int | None:
    if isinstance(right, int) and not isinstance(right, bool):
        return right if 0 <= right < len(options) else None
    if not isinstance(right, str):
        return None
    same = [place for place, option in enumerate(options) if option.strip() == right.strip()]
    if len(same) == 1:  # the text first: an option may be the single letter B
        return same[0]
    found = _letter(right)
    if found is not None and LETTERS.index(found[0]) < len(options):
        return LETTERS.index(found[0])
    return _by_text(right, options)


def _choice(content: str, options: tuple[str, ...]) -> tuple[str, str] | None:
    """(letter, "") or ("", the text's form) that a stated answer names; None where it names none, or several."""
    found = _letter(content)
    if found is not None and not found[1] and options and _is_a_text(content, found[0], options):
        found = None
    if found is None:
        place = _by_text(content, options) if options else None
        if place is not None:
            return LETTERS[place], ""
        form = text_form(_bare(content))
        return None if options or not form else ("", form)
    letter, rest = found
    if not letter:
        return None
    if options:
        place = LETTERS.index(letter)
        said = _by_text(rest, options) if rest else None
        if place >= len(options) or (said is not None and said != place):
            return None  # no such option, or the letter of one and the text of another
    return letter, ""


def _is_a_text(content: str, letter: str, options: tuple[str, ...]) -> bool:
    """Whether a single letter is an option's text: x among x and y, where it is written small or names no option."""
    bare = _bare(content).strip(" .()")
    return bare in options and (bare.islower() or letter not in LETTERS[: len(options)])


def _by_text(text: str, options: tuple[str, ...]) -> int | None:
    form = text_form(_bare(text))
    places = [place for place, option in enumerate(options) if form and text_form(_bare(option)) == form]
    return places[0] if len(places) == 1 else None


def _letter(content: str) -> tuple[str, str] | None:
    """(letter, what stands behind it) of an answer that begins with one; ("", "") where it names several."""
    text = _bare(content)
    match = _LETTER.fullmatch(text)
    if match is None:
        return None
    letter, rest = match["inside"] or match["bare"], match["rest"].strip()
    if letter.islower() and match["inside"] is None and (rest or len(text.rstrip(".)")) > 1):
        return None  # the article, or a variable
    if _several(match["end"] + match["rest"]):
        return "", ""
    return letter.upper(), rest.strip(" .,:;-")


def _several(behind: str) -> bool:
    """Whether what stands behind a letter begins with another one: `A, C`, `(A) or (B)`, `(A)(B)`."""
    separator = _SEPARATOR.match(behind.lstrip(")]. "))
    rest = behind.lstrip(")]. ")
    if separator is not None:
        return _ANOTHER.match(rest[separator.end() :]) is not None
    return re.match(r"[(\[]\s*[A-Z]\s*[)\]]", rest) is not None


def _bare(content: str) -> str:
    return " ".join(_MARKS.sub("", unwrapped(content)).split())
