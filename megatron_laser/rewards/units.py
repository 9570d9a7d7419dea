r"""What stands beside a number and is no part of it: units, currencies, degrees; and words. Strings only.

Units do not count: 12 cm, 12 and 12 m are one answer. Votes are classes: what equals 12 equals all that 12 does.
"""

from __future__ import annotations

import re

_TEXT_UNIT = re.compile(
    r"(?:\s*(?:/|\\cdot|\\times)?\s*\\text\{([^{}]*)\}\s*(?:\^\s*(?:\{\s*-?\d+\s*\}|\d))?)$"
)
_BARE_UNIT = re.compile(
    r"(?<=[\d})\s])\s*(?:(?:sq(?:uare)?|cubic)\s+)?(?:cm|mm|km|kg|mg|ml|mL|ft|mph|km/h|cm\^?2|"
    r"(?:inch|mile|meter|metre|centimeter|kilometer|gram|kilogram|liter|litre|degree|dollar|cent|unit|hour|minute|"
    r"second|day|week|month|year|square|pound|point|percent)(?:s|es)?|feet|inches)\s*(?:\^\s*\{?\s*[23]\s*\}?)?$"
)
_DEGREE_SIGN = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\\text\{\s*[CF]\s*\}|[CF])?$")
_PERCENT = re.compile(r"\s*\\?%$")
_CURRENCY = re.compile(
    r"^([+-]?)\s*(?:\\\$|\$|€|£|¥|₹|\\text\{\s*(?:USD|Rs)\.?\s*\})\s*|\s*(?:\\\$|€|£|¥|₹)$"
)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_UNIT_WORDS = re.compile(r"[a-zA-Z°µ/^\d\s.\-·()]*")
# words behind a number that are no unit: they change what is said
_NOT_UNITS = re.compile(
    r"\b(?:and|or|not|no|if|for|when|where|with|except|more|less|fewer|least|most|mod|modulo|base|otherwise|undefined|"
    r"only|than|to|from|is|are|all|any|infinitely|approximately|about)\b"
)
_SCALES = {"hundred": "100", "dozen": "12", "thousand": "1000", "million": "10^{6}", "billion": "10^{9}"}
_SCALES["trillion"] = "10^{12}"

_TEXTS = re.compile(r"(?:\\text\{[^{}]*\}\s*)+")
_LETTERS = re.compile(r"[a-zA-Z][a-zA-Z'\- ]*")
_SHORT_WORDS = frozenset(
    [
        *(
            "yes",
            "no",
            "odd",
            "one",
            "two",
            "six",
            "ten",
            "red",
            "all",
            "any",
            "none",
            "both",
            "never",
            "true",
        ),
        *("false", "up", "down", "left", "right", "day", "even", "east", "west"),
    ]
)
_NOT_WORDS = re.compile(r"(?:sin|cos|tan|cot|sec|csc|arc|log|ln|sqrt|exp|pi|inf|alpha|beta|theta|lambda)")


def without_units(text: str) -> str:
    """The text without the units behind it and currencies beside it; as it is where there are none."""
    for pattern in (_PERCENT, _BARE_UNIT):
        if (shorter := pattern.sub("", text)) != text and _ends_a_value(shorter):
            return shorter
    if (shorter := _CURRENCY.sub(r"\1", text)) != text and shorter.strip():
        return shorter.strip()
    if not _TRIGONOMETRIC.search(text) and (match := _DEGREE_SIGN.search(text)):
        return text[: match.start()].strip()
    if match := _TEXT_UNIT.search(text):
        core, words = text[: match.start()].strip(), match[1].strip().lower()
        if not _ends_a_value(core) or not _UNIT_WORDS.fullmatch(words) or _NOT_UNITS.search(words):
            return text
        first, _, rest = words.partition(" ")
        if first in _SCALES:
            return f"{core} \\cdot {_SCALES[first]}" + (f" \\text{{{rest}}}" if rest else "")
        return core
    return text


def _ends_a_value(core: str) -> bool:
    return core != "" and (core[-1].isalnum() or core[-1] in ")]}!%$|")


def as_words(text: str) -> str | None:
    r"""The words of an answer that is words: `\text{Monday}`, `Monday`; None for anything else.

    Letters alone are a word where they look like one; `xy` and `abc` are products. What stands in `\text` is
    returned whatever it is, also a number or a single letter.
    """
    if _TEXTS.fullmatch(text):
        words = " ".join(re.findall(r"\\text\{([^{}]*)\}", text))
    elif _LETTERS.fullmatch(text) and _looks_like_words(text):
        words = text
    else:
        return None
    words = " ".join(words.replace('"', " ").split()).strip(" .,;:!'")
    if words.startswith("(") and words.endswith(")"):
        words = words[1:-1].strip()
    return words or None


def _looks_like_words(text: str) -> bool:
    tokens = text.split()
    if len(tokens) > 1:
        return any(len(token) > 2 for token in tokens)
    if _NOT_WORDS.match(text):
        return False
    is_name = len(text) > 1 and text[0].isupper() and text[1:].islower()
    if len(text) > 2 and text.isupper():
        return True
    return text.lower() in _SHORT_WORDS or is_name or (len(text) > 3 and bool(set(text) & set("eiouyEIOUY")))
