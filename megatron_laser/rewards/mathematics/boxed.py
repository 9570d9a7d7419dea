r"""Finding the final answer: the last \boxed{...} of a response, in linear time. Strings only, no parsing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# Reference answers of MATH, DeepMath and the olympiad sets stay below 400 characters. math-verify's regular
# expressions and LaTeX parser are super-linear, so what is longer is not handed to them.
MAX_ANSWER_CHARS = 2000

_COMMAND = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace, \{, is a symbol and no group
_BARE = re.compile(r"[^\s$]+")
_SIZED_DELIMITER = re.compile(r"\\(?:left|right)(?=[()\[\]|]|\\[{}|])")
_SIZED_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_GROUP_COMMA = re.compile(r",\s*\\!\s*(?=[0-9]{3}(?![0-9]))")  # 10,\!080 is one number, and 10, 080 a list
_BLANKS = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Box:
    """The last box of a text: `state` is found, none (there is no box) or bad (unclosed, empty, too long)."""

    state: Literal["found", "none", "bad"]
    content: str = ""


def find_last_box(text: str) -> Box:
    r"""The content of the last complete `\boxed{...}` or `\fbox{...}`; also of `\boxed 5`.

    A box that the end of the text cuts off gives way to the complete one before it. The last box decides
    alone when it is empty or longer than MAX_ANSWER_CHARS. Of nested boxes the innermost counts. Time is
    linear in the text: only boxes among its last MAX_ANSWER_CHARS characters can be passed over as cut off.
    """
    last = {name: text.rfind(name) for name in ("\\boxed", "\\fbox")}
    seen_unclosed = False
    while True:
        name = max(last, key=lambda name: last[name])
        start = last[name]
        if start < 0:
            return Box("bad" if seen_unclosed else "none")
        last[name] = text.rfind(name, 0, start)
        command = _COMMAND.match(text, start)
        if command is None:  # a longer command's name, such as \boxedeqn
            continue
        content, unclosed = _content_after(text, command.end())
        if unclosed:
            seen_unclosed = True
            continue
        if content is None or not content.strip():
            return Box("bad")
        return Box("found", content.strip())


def _content_after(text: str, position: int) -> tuple[str | None, bool]:
    """The box's content from `position` on (None: longer than allowed), and whether the text cut it off."""
    limit = min(len(text), position + MAX_ANSWER_CHARS + 2)
    while position < limit and text[position].isspace():
        position += 1
    if position == len(text):
        return None, True
    if text[position : position + 1] != "{":
        bare = _BARE.match(text, position, limit)
        return (bare.group().rstrip(".,;:") if bare else None), False
    depth = 0
    for token in _BRACE_OR_ESCAPE.finditer(text, position, limit):
        if token.group() == "{":
            depth += 1
        elif token.group() == "}":
            depth -= 1
            if depth == 0:
                return text[position + 1 : token.start()], False
    return None, limit == len(text)


def normalize_answer(answer: str) -> str:
    r"""Spelling that carries no meaning removed: outer `$`, `\(`, blanks, `\left`, `\dfrac`, `\!`.

    Equal results mean equal answers; different results mean nothing. Normalising twice changes nothing.
    What is longer than MAX_ANSWER_CHARS is only stripped.
    """
    answer = answer.strip()
    if (
        len(answer) > MAX_ANSWER_CHARS
    ):  # it is not read (see `parse_answer`), and each pass may undo one mark only
        return answer
    previous = None
    while previous != answer:
        previous = answer
        answer = _GROUP_COMMA.sub("{,}", answer)
        answer = _SIZED_FRACTION.sub(r"\\frac", _SIZED_DELIMITER.sub("", answer.replace("\\!", "")))
        answer = _strip_math_delimiters(_BLANKS.sub(" ", answer).strip())
    return answer


def _strip_math_delimiters(answer: str) -> str:
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = answer[len(opening) : len(answer) - len(closing)]
        if (
            answer.startswith(opening)
            and answer.endswith(closing)
            and len(answer) > len(opening) + len(closing)
            and "$" not in inner
            and "\\(" not in inner
            and "\\[" not in inner
            and not inner.endswith("\\")
        ):
            return inner.strip()
    return answer


def extract_answer(response: str) -> str | None:
    """The last box's content, normalised; None when there is none that can be read. For voting."""
    box = find_last_box(response)
    return normalize_answer(box.content) or None if box.state == "found" else None


def behind_hashes(answer: str) -> str:
    """What follows a last `####` on the same line, as GSM8K ends its solutions; without one the text as it is.

    A heading is none: behind it other lines follow.
    """
    _, hashes, ending = answer.rpartition("####")
    ending = ending.strip()
    return ending if hashes and ending and "\n" not in ending else answer


def gold_answer(answer: str) -> str:
    r"""A reference answer, normalised; given plain, in `$...$`, or in a worked solution with a box or `#### ...`."""
    answer = behind_hashes(answer)
    box = find_last_box(answer)
    return normalize_answer(box.content if box.state == "found" else answer)


def has_exactly_one_box(response: str) -> bool:
    r"""Format check: exactly one `\boxed` or `\fbox`, and it is complete. Never part of the reward."""
    return len(_COMMAND.findall(response)) == 1 and find_last_box(response).state == "found"
