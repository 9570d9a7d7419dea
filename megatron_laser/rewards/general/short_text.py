"""Short answers in words: `free_text` accepts another spelling of the reference, and what math_verify accepts.

Two texts are the same where they differ in case, articles, punctuation, typesetting or the way a small number is
written, and nowhere else: nothing is guessed about synonyms.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from megatron_laser.rewards.general.stated import stated_answer, unwrapped
from megatron_laser.rewards.grade import Grade
from megatron_laser.rewards.mathematics.boxed import MAX_ANSWER_CHARS, gold_answer, normalize_answer
from megatron_laser.rewards.mathematics.grading import (
    CORRECT,
    NO_ANSWER,
    UNPARSABLE,
    WRONG,
    compare_answers,
    quick_equal,
)
from megatron_laser.rewards.mathematics.units import unit_of

_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_PLAIN = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—−", "-") | dict.fromkeys("‘’ʼ`´", "'") | dict.fromkeys("“”", '"'))
_SPACING = re.compile(r"\\[,;:! ]|\\(?:quad|qquad)(?![a-zA-Z])|~|\\\(|\\\)|\\\[|\\\]|\$|\*\*|__")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b\s*")
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_INNER_DOT = re.compile(r"(?<=[a-z])\.(?=[a-z]\b)|(?<=\b[a-z])\.")  # u.s. and e.g.
_HYPHEN = re.compile(r"(?<=[a-z]{2})-(?=[a-z]{2})|(?<=[a-z]{3})-(?=\d)|(?<=\d)-(?=[a-z]{3})")
_OPERATOR = re.compile(r"\s*([-+^/=<>%])\s*")
_DROPPED = re.compile(r"[\"'_{}]|\.(?!\d)|(?<!\d)\.(?=\s)")
_BLANK = re.compile(r"[\s,;:!?()\[\]|]+")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBERS = {name: str(number) for number, name in enumerate(_NUMBER_WORDS.split())}
_YES_NO = ("yes", "no", "true", "false")
_CLAUSE = re.compile(r"[,;:.]|\s-\s|\bbecause\b|\bsince\b")

_MATHEMATICS = re.compile(r"[\d\\^=]")
_QUANTITY = re.compile(
    r"(?P<number>[+-]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    r"(?:\s*(?:\\times|\\cdot|×|x|\*|·)\s*10\s*\^\s*(?:\{\s*[+-]?\d+\s*\}|[+-]?\d+)|[eE][+-]?\d+)?"
    r"|[+-]?\\d?frac\{\d+\}\{\d+\})\s*(?P<unit>[a-zA-ZΩΩµμ°Å/%].*)?",
    re.DOTALL,
)
_UNIT_MARKS = re.compile(r"[{}\s^*·⋅.\\]|cdot|\\times")
_UNIT_NAMES = {
    **dict.fromkeys(("mole", "moles"), "mol"),
    **dict.fromkeys(("ohm", "ohms", "omega"), "Ω"),
    **dict.fromkeys(("volt", "volts"), "V"),
    **dict.fromkeys(("watt", "watts"), "W"),
    **dict.fromkeys(("pascal", "pascals"), "Pa"),
    **dict.fromkeys(("kelvin", "kelvins"), "K"),
    **dict.fromkeys(("joule", "joules"), "J"),
    **dict.fromkeys(("newton", "newtons"), "N"),
    **dict.fromkeys(("coulomb", "coulombs"), "C"),
    **dict.fromkeys(("ampere", "amperes", "amp", "amps"), "A"),
    **dict.fromkeys(("tesla", "teslas"), "T"),
    **dict.fromkeys(("meter", "meters", "metre", "metres"), "m"),
    **dict.fromkeys(("second", "seconds", "sec"), "s"),
    **dict.fromkeys(("gram", "grams"), "g"),
    **dict.fromkeys(("kilogram", "kilograms"), "kg"),
    **dict.fromkeys(("liter", "liters", "litre", "litres"), "L"),
    "hertz": "Hz",
}
_UNIT_WORD = re.compile(r"[a-zA-Z]+")
_SYMBOLS_ALONE = frozenset(["°C", "°F", "Ω", "Å"])
_SI = re.compile(
    r"1?(?:(?:da|[YZEPTGMkhdcmμunpf])?(?:mol|cd|Hz|Pa|Wb|lm|Bq|Gy|Sv|eV|bar|atm|cal|rad|min|[mgsAKNJWCVFΩSTHLlMh])-?\d?)+"
)
_NO_UNITS = frozenset(["K", "k", "M", "pm", "am"])  # thousands, millions; times of the day
_HOURS = frozenset(["am", "pm", "bc", "ad", "bce", "ce"])
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FORMULA = re.compile(r"(?=.*\d)(?:[A-Z][a-z]?\d*|[()]\d*)+")


def free_text(response: str, answer: str) -> Grade:
    r"""Right where the answer that the response ends in is the reference, in any spelling (`same_text`).

    Args:
        response: the model's text; its answer is the last \boxed{}, or what follows its last "the answer is".
        answer: the reference; of a worked solution its end or box counts.

    Raises:
        ValueError: the reference is empty.
    """
    gold = gold_answer(answer)
    if not gold:
        raise ValueError("the reference is empty")
    stated = stated_answer(response)
    if stated.state != "found":
        return NO_ANSWER if stated.state == "none" else UNPARSABLE
    found = normalize_answer(stated.content)
    if not found:
        return UNPARSABLE
    return CORRECT if same_text(found, gold) else WRONG


def extract_text(response: str) -> str | None:
    """The answer that a response ends in, for votes; None without one."""
    stated = stated_answer(response)
    return normalize_answer(stated.content) or None if stated.state == "found" else None


def same_text(left: str, right: str) -> bool:
    """Whether two normalised answers are one: as texts, as quantities with their units, or by math_verify.

    Symmetric. May take as long as math_verify does (see `GradingPool`).
    """
    settled = quick_same_text(left, right)
    return compare_answers(left, right) is True if settled is None else settled


def quick_same_text(left: str, right: str) -> bool | None:
    """What `same_text` says where microseconds suffice, None where math_verify has to decide."""
    quantities = _quantity(left), _quantity(right)
    if quantities[0] is not None and quantities[1] is not None:
        one, one_unit = quantities[0]
        other, other_unit = quantities[1]
        if one_unit and other_unit:  # both have one: it has to be the same
            return quick_equal(one, other) if one_unit == other_unit else False
        if (not one_unit and not other_unit) or _is_unit(one_unit or other_unit):
            return quick_equal(one, other)
        return quick_equal(left, right)  # 5 thousand is not 5: math_verify knows which words are units
    first, second = text_form(left), text_form(right)
    if first and first == second and (_is_worded(left) or _is_worded(right)):
        return True
    if not (_MATHEMATICS.search(left) and _MATHEMATICS.search(right)):
        if not (_is_worded(left) or _is_worded(right)):
            return quick_equal(left, right)  # symbols: a + b, (x, y)
        # words, of which math_verify would make products of letters; but yes and no may have a reason behind them
        return _yes_no(left) == _yes_no(right) != ""
    return quick_equal(left, right)


@lru_cache(maxsize=8192)
def text_form(answer: str) -> str:
    """An answer without what carries no meaning in words; "" where nothing is left."""
    text = answer[:MAX_ANSWER_CHARS].translate(_DASHES)
    text = _SUPERSCRIPT.sub(lambda found: f"^{found.group().translate(_PLAIN)}", text)
    text = _SPACING.sub(" ", unwrapped(text)).replace("\\%", "%").replace("\\&", "&").replace("&", " and ")
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _GROUPS.sub("", text)
    text = _HYPHEN.sub(" ", _INNER_DOT.sub("", text))
    text = _BLANK.sub(" ", _DROPPED.sub("", f"{text} ")).strip()
    bare = _ARTICLE.sub("", text).strip()
    words = [_NUMBERS.get(word, word) for word in (bare or text).split()]
    return _OPERATOR.sub(r"\1", " ".join(words))


def _is_worded(answer: str) -> bool:
    """Whether an answer has a word in it, or is a formula like H2O; else spelling is mathematics."""
    text = _COMMAND.sub(" ", unwrapped(answer))
    return _WORD.search(text) is not None or _FORMULA.fullmatch(re.sub(r"[_{}$ ]", "", text)) is not None


def _is_unit(unit: str) -> bool:
    """Whether it is surely a unit, so that a number without one may mean the same."""
    si = all(_SI.fullmatch(part) for part in unit.split("/")) and unit not in _NO_UNITS
    return si or unit_of(unit) is not None or unit in _SYMBOLS_ALONE


def _yes_no(answer: str) -> str:
    """yes, no, true or false where an answer begins with it, and goes on with a reason or not at all; else ""."""
    form = text_form(_CLAUSE.split(answer.strip().casefold(), maxsplit=1)[0])
    return form if form in _YES_NO else ""


@lru_cache(maxsize=8192)
def _quantity(answer: str) -> tuple[str, str] | None:
    """(number, its unit in one spelling or "") of an answer that is one quantity; None for any other."""
    text = answer[:MAX_ANSWER_CHARS].translate(_DASHES)
    text = (
        _SPACING.sub(" ", unwrapped(text))
        .replace("^{\\circ}", "°")
        .replace("^\\circ", "°")
        .replace("\\Omega", "Ω")
    )
    text = _SUPERSCRIPT.sub(lambda found: f"^{found.group().translate(_PLAIN)}", text)
    text = (
        text.replace("\\mu", "μ").replace("µ", "μ").replace("Ω", "Ω").replace("\\%", "%").strip().rstrip(".")
    )
    if text.casefold().endswith(("degrees celsius", "degree celsius")):
        text = text[: text.casefold().rindex("degree")] + "°C"
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number = match["number"].replace("×", "\\times").replace("·", "\\cdot").replace("*", "\\times")
    number = re.sub(r"\s*x\s*(?=10)", r" \\times ", number)
    return normalize_answer(number), _unit(match["unit"] or "")


def _unit(written: str) -> str:
    words = re.sub(r"\bper\b", "/", written.strip())
    if (known := unit_of(words)) is not None:
        return known
    named = _UNIT_WORD.sub(lambda found: _UNIT_NAMES.get(found.group().casefold(), found.group()), words)
    if (known := unit_of(named)) is not None:
        return known
    squeezed = _UNIT_MARKS.sub("", named)
    if squeezed.casefold() in _HOURS:
        return squeezed.casefold()
    # mW and MW differ; Apples and apple do not
    return squeezed if len(squeezed) <= 3 or not squeezed.isalpha() else squeezed.casefold().rstrip("s")
