r"""What stands beside a number and is no part of it: units, currencies, degrees; and words. Strings only.

12 cm is 12, and so is 12 m; but where both sides have a unit that is known, it has to be the same.
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
    r"only|than|to|from|is|are|all|any|infinitely|approximately|about|"
    r"am|pm|[ap]\.\s?m|left|right|up|down|north|south|east|west|above|below|"
    r"half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|"
    r"\w+teen|\w+tie|hundred|\w+sand|\w+llion)ths?|times|plus|minus|negative|positive|squared|"
    r"cubed|factorial|doubled|tripled|inverse|reciprocal|repeating|recurring|repeated|score|gross|pi|r|remainder|bc|ad|"
    r"bce|ce|over|by|even|odd|prime|o'?clock)\b"
)
_NUMBER_INSIDE = re.compile(r"(?<![\^\d])(?<!\^-)\d")  # other than a power: feet 6 inches
_SHORT_SCALES = frozenset(["k", "K", "M", "B"])  # 5K, but 300 K
_CURRENCY_SIGN = re.compile(r"[$€£¥₹]")
_SAME_UNITS = (
    ("cm", "centimeter", "centimeters", "centimetre", "centimetres"),
    ("m", "meter", "meters", "metre", "metres"),
    ("km", "kilometer", "kilometers", "kilometre", "kilometres"),
    ("mm", "millimeter", "millimeters"),
    ("in", "inch", "inches"),
    ("ft", "foot", "feet"),
    ("yd", "yard", "yards"),
    ("mi", "mile", "miles"),
    ("s", "sec", "second", "seconds"),
    ("min", "minute", "minutes"),
    ("h", "hr", "hour", "hours"),
    ("day", "days"),
    ("week", "weeks"),
    ("month", "months"),
    ("year", "years"),
    ("g", "gram", "grams"),
    ("kg", "kilogram", "kilograms"),
    ("mg", "milligram", "milligrams"),
    ("lb", "pound", "pounds"),
    ("L", "l", "liter", "liters", "litre", "litres"),
    ("mL", "ml", "milliliter", "milliliters"),
    ("$", "dollar", "dollars", "usd"),
    ("cent", "cents"),
    ("€", "euro", "euros"),
    ("£",),
    ("°", "degree", "degrees", "deg"),
    ("°C",),
    ("°F",),
    ("mi/h", "mph"),
    ("km/h", "kph", "kmh"),
    ("N", "newton", "newtons"),
    ("J", "joule", "joules"),
    ("oz", "ounce", "ounces"),
    ("qt", "quart", "quarts"),
    ("gal", "gallon", "gallons"),
    ("rad", "radian", "radians"),
    ("%", "percent"),
)
_UNITS = {name: names[0] for names in _SAME_UNITS for name in names}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}
_SCALES = {"hundred": "100", "dozen": "12", "thousand": "1000", "million": "10^{6}", "billion": "10^{9}"}
_SCALES["trillion"] = "10^{12}"
_SCALES |= {f"{name}s": value for name, value in _SCALES.items()} | {"dozens": "12"}

_TEXTS = re.compile(r"(?:\\text\{[^{}]*\}\s*)+")
_NUMBER_IN_TEXT = re.compile(
    r"\\text\{\s*([+-]?\d[\d,./]*)\s+([a-zA-Z][a-zA-Z /^]*[a-zA-Z.]\^?[23]?|[a-zA-Z])\s*\}"
)
_UNIT_QUOTIENT = re.compile(r"[+-]?\d[\d.]* ([a-zA-Z]+) ?/ ?([a-zA-Z]+)(?:\^\{?2\}?)?")
_WORDS_BEHIND = re.compile(
    r"([+-]?(?:\d[\d./]*|\\frac\{\d+\}\{\d+\})) ([a-zA-Z]+(?: [a-zA-Z]+)*)((?:\s?\^\s?\{?[23]\}?)?)"
)
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


def split_units(text: str) -> tuple[str, str | None]:
    r"""The text without the units behind it and currencies beside it, and the unit in one spelling.

    The unit is None where there is none, and has a ? in front where it is not known: (12, cm^2) for
    `12 \text{ square cm}`, and (5, ?apple) for `5 \text{ apples}`.
    """
    written = ""
    while True:
        shorter, unit = _strip_one(text)
        if shorter == text:
            return text, (
                unit_of(written) or f"?{_plain_words(written).lower().rstrip('s')}"
            ) if written else None
        text, written = shorter, unit + written


def _plain_words(written: str) -> str:
    return " ".join(re.sub(r"\\text|\\cdot|[{}()]", " ", written).split())


def unit_of(written: str) -> str | None:
    """A known unit in one spelling, with its power; None for any other text."""
    words = re.sub(r"\bper\b", "/", re.sub(r"\s*\^\s*", "^", _plain_words(written)))
    parts = []
    for part in words.split("/"):
        power = 1
        tokens = part.split()
        if tokens and tokens[0].lower() in _POWERS:
            power = _POWERS[tokens.pop(0).lower()]
        if len(tokens) == 2 and tokens[1].lower() in _POWERS:
            power = _POWERS[tokens.pop().lower()]
        name, _, exponent = (tokens[0] if len(tokens) == 1 else "").partition("^")
        unit = _UNITS.get(name) or _UNITS.get(name.lower())
        if unit is None or (exponent and not exponent.lstrip("-").isdigit()):
            return None
        power *= int(exponent or 1)
        parts.append(unit if power == 1 else f"{unit}^{power}")
    return "/".join(parts)


def _strip_one(text: str) -> tuple[str, str]:
    """The text without its last unit, and that; the text itself and "" where there is none."""
    for pattern, unit in ((_PERCENT, "%"), (_BARE_UNIT, "")):
        if (match := pattern.search(text)) and _ends_a_value(text[: match.start()]):
            return text[: match.start()].strip(), unit or f" {match.group()} "
    if (shorter := _CURRENCY.sub(r"\1", text)) != text and shorter.strip():
        sign = _CURRENCY_SIGN.search(text)
        return shorter.strip(), sign[0] if sign else ""
    if not _TRIGONOMETRIC.search(text) and (match := _DEGREE_SIGN.search(text)):
        scale = match.group().rstrip("} ")[-1:]
        return text[: match.start()].strip(), f"°{scale}" if scale in ("C", "F") else "°"
    if match := _TEXT_UNIT.search(text):
        core, words = text[: match.start()].strip(), match[1].strip()
        plain = words.lower()
        if not _ends_a_value(core) or not _UNIT_WORDS.fullmatch(words) or _says_more(match[1]):
            return text, ""
        first, _, rest = plain.partition(" ")
        if first in _SCALES:
            return f"{core} \\cdot {_SCALES[first]}" + (f" \\text{{{rest}}}" if rest else ""), ""
        return core, match.group()
    return text, ""


def with_text_unit(text: str) -> str | None:
    r"""`5 people` and `\text{3 hours}` as a number and a text behind it; the text itself where there is no such word.

    None where the letters behind a number can be a unit as well as a product: `5 m`, `5 cat`.
    """
    if match := _NUMBER_IN_TEXT.fullmatch(text):
        return f"{match[1]} \\text{{{match[2]}}}"
    if (quotient := _UNIT_QUOTIENT.fullmatch(text)) and {quotient[1], quotient[2]} <= _UNITS.keys():
        return None
    match = _WORDS_BEHIND.fullmatch(text)
    if match is None or _NOT_WORDS.match(match[2]):
        return text
    first, is_one = match[2].split()[0], " " not in match[2]
    if is_one and len(first) == 1:
        return None if first in _UNITS else text
    if first in _UNITS or _looks_like_words(match[2]):
        return f"{match[1]} \\text{{{match[2]}}}{match[3]}"
    is_word = len(first) > 2 and set(first.lower()) & set("aeiou") and list(first) != sorted(first)
    return None if is_word else text


def _says_more(words: str) -> bool:
    """Whether words behind a number change its value, so that they are no unit."""
    plain = words.strip().lower()
    power = re.fullmatch(r"(?:\S+ )?(?:squared|cubed)", plain)  # meters squared, but 5 squared
    named = unit_of(words) is not None and power is not None and " " in plain
    return words in _SHORT_SCALES or bool(
        _NUMBER_INSIDE.search(words) or (_NOT_UNITS.search(plain) and not named)
    )


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
