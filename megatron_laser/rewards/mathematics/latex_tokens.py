r"""Cutting an answer in normalised LaTeX at commas, relations and unions outside brackets. Strings only."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\begin\{[a-zA-Z]+\*?\}|\\end\{[a-zA-Z]+\*?\}|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_RELATION = {
    **{"=": "=", ":=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in"},
    **{
        "\\approx": "~",
        "\\equiv": "?",
        "\\to": "?",
        "\\Rightarrow": "?",
        "\\implies": "?",
        "\\iff": "?",
        "\\sim": "?",
    },
    **{
        "\\mid": "?",
        "\\rightarrow": "?",
        "\\subset": "?",
        "\\subseteq": "?",
        "\\cong": "?",
        "\\parallel": "?",
    },
}
_AND_OR = re.compile(r"\\text\{[\s,]*(and|or)[\s,]*\}|(?<![a-zA-Z\\{])(and|or)(?![a-zA-Z}])")


def tokens(text: str) -> list[tuple[str, int, bool]]:
    """(token, position, outside brackets) for each LaTeX command or character; brackets of any kind count."""
    found, depth = [], 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in (")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil") or token.startswith("\\end{"):
            depth -= 1
        found.append((token, match.start(), depth == 0))
        if token in ("(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil") or token.startswith("\\begin{"):
            depth += 1
    return found


def split(text: str, *separators: str) -> list[str]:
    """The parts between separators outside brackets, stripped; one part where there is none."""
    parts, start = [], 0
    for token, position, outside in tokens(text):
        if outside and token in separators:
            parts.append(text[start:position].strip())
            start = position + len(token)
    return [*parts, text[start:].strip()]


def split_words(text: str) -> tuple[list[str], set[str]]:
    r"""The parts between `and` and `or` outside brackets, and which of the two words there were."""
    outside = {position for _, position, free in tokens(text) if free}
    parts, start, words = [], 0, set()
    for match in _AND_OR.finditer(text):
        if match.start() in outside:
            parts.append(text[start : match.start()].strip(" ,"))
            start = match.end()
            words.add(match[1] or match[2])
    return [*parts, text[start:].strip(" ,")], words


def split_relations(text: str) -> tuple[list[str], list[str]]:
    """Sides and relations between them, in order: `1 < x <= 2` gives ([1, x, 2], [<, <=]); ? is one not known."""
    sides, relations, start = [], [], 0
    for token, position, outside in tokens(text):
        if position < start or not outside:
            continue
        if text.startswith(":=", position):
            token = ":="
        if token in _RELATION:
            sides.append(text[start:position].strip())
            relations.append(_RELATION[token])
            start = position + len(token)
    return [*sides, text[start:].strip()], relations


def bracketed(text: str) -> tuple[str, str, str] | None:
    r"""(opening, content, closing) of a text that is one pair of brackets: ( [ \{ \langle, closed by any of them."""
    for opening in ("(", "[", "\\{", "\\langle"):
        if text.startswith(opening):
            break
    else:
        return None
    found = tokens(text)
    for place, (token, position, outside) in enumerate(found):
        if place and outside:
            if place != len(found) - 1 or token not in (")", "]", "\\}", "\\rangle"):
                return None
            return opening, text[len(opening) : position].strip(), token
    return None
