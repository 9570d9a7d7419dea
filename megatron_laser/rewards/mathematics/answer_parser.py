r"""Parsing an answer: from its text to what it is. Lists, points, intervals, words and relations are parsed here,
single expressions by math-verify's LaTeX parser.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

import sympy

from megatron_laser.rewards.mathematics.answer_types import (
    Clock,
    Items,
    Letters,
    Numeral,
    ParsedAnswer,
    Piece,
    Point,
    Reals,
    Table,
    Unparsed,
    Value,
    Words,
)
from megatron_laser.rewards.mathematics.boxed import MAX_ANSWER_CHARS
from megatron_laser.rewards.mathematics.equations import ParsePart, assigned_name, parse_relation, unknown_of
from megatron_laser.rewards.mathematics.expression_parser import is_infinite, parse_expression
from megatron_laser.rewards.mathematics.intervals import (
    WHOLE,
    NotComparedError,
    complement,
    intersection,
    parsed_set,
    pieces_of,
    union,
)
from megatron_laser.rewards.mathematics.latex_tokens import bracketed, split, split_relations, split_words
from megatron_laser.rewards.mathematics.normalization import (
    MAX_NESTING,
    nesting,
    normalize_latex,
    number_value,
)
from megatron_laser.rewards.mathematics.units import as_words, split_units, with_text_unit

_BASES = dict(
    zip(["two", "three", "four", "five", "six", "seven", "eight", "nine"], range(2, 10), strict=True),
    ten=10,
    eleven=11,
    twelve=12,
    sixteen=16,
)
_BASE = r"(?:\\text\{\s*(?:base\s*)?(?P<word>[a-z]+|\d+)\s*\}|(?:base\s*)?(?P<number>\d{1,2})|(?P<bare>[a-z]{3,7}))"
_NUMERAL = re.compile(
    rf"(?:\\text\{{)?[({{]*(?P<digits>[0-9A-F]+)\}}?[)}}]*\s*_\s*(?:\{{\s*\(?\s*{_BASE}\s*\)?\s*\}}|(?P<short>\d)|"
    r"\\text\{\s*(?P<text>[a-z]+|\d+)\s*\})"
)
_SPOKEN_NUMERAL = re.compile(
    r"(?P<digits>[0-9A-F]+)\s*\\text\{\s*\(?\s*(?:in\s*)?base"
    r"(?:[- ]\s*(?P<word>\w+)\s*\)?\s*\}|\s*\}\s*(?P<number>\d+))"
)
_BARE_NUMERAL = re.compile(r"(?P<digits>[0-9]+) (?:in )?base[ -](?P<word>\w+)")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}")
# math-verify's parser would drop a number's subscript or a transpose, and multiply numbers side by side
_DROPPED = re.compile(r"[\d)]\s*_|(?<![_^])\d\s+\d|\^\s*\{?\s*(?:T|\\top|\\intercal|\*|\\ast)(?![a-zA-Z])")
# what it computes at once or takes seconds for
_TOO_MUCH = re.compile(
    r"\\[dt]?binom\s*\{\s*\d{6,}|(?:[^|]*\|){20}|(?:[^!]*!){20}|(?:[^']*'){40}|\\prod.*\\infty"
    r"|\\(?:sum|prod|i*int)(?![a-zA-Z]).*\\(?:sum|prod|int)(?![a-zA-Z])"  # a sum of sums
    r"|(?:\\det(?![a-zA-Z])|\{[vV]matrix\})(?:[^&]*&){15}"
)
_POINT = re.compile(r"\d\.\d|(?<!\d)\.\d")
_CLOCK = re.compile(
    r"(?:\\text\{\s*)?([01]?\d|2[0-4]):([0-5]\d)\s*(?:\\text\{\s*)?(?:([apAP])\.?\s?[mM]\.?)?\s*\}?"
)
_DATE = re.compile(r"[A-Z][a-z]{2,} \d{1,2}(?:,? \d{4})?")
_AMBIGUOUS = re.compile(r"-?\d*\.\d+\(\d+\)|[A-Z]\(\d+, ?\d+\)")  # a period or a factor; \binom or a point
_CHOICE = re.compile(r"(?:option|answer|choice) \(?([A-Za-z])\)?", re.IGNORECASE)
_ENUMERATION = re.compile(r",\s*(?:and\s+)?|\s+and\s+")
_CAPITALS = re.compile(r"[A-Z]{2}|\\(?:angle|triangle)\s*\{?\s*[A-Z]{2,3}\s*\}?")
_MAX_DEPTH = 8
_INDEX = re.compile(r"_(?:\d|\{\d+\})$")  # of one of several values of a quantity: x_1
_MAX_PARTS = 200


@lru_cache(maxsize=4096)  # references repeat over a group, and answers over the pairs of a vote
def parse_answer(answer: str) -> ParsedAnswer:
    """The parsed answer (see `extract_answer`); Unparsed where it is too long or deep, or no mathematics."""
    if len(answer) > MAX_ANSWER_CHARS or nesting(answer) > MAX_NESTING:
        return Unparsed(answer)
    try:
        return _parse(answer, 0)
    except MemoryError:
        raise
    except Exception:  # SymPy raises anything on odd input, a RecursionError on deep expressions
        return Unparsed(answer)


def _parse(text: str, depth: int) -> ParsedAnswer:
    text = normalize_latex(text)
    if not text or depth > _MAX_DEPTH or len(text) > MAX_ANSWER_CHARS:
        return Unparsed(text)

    def parse(part: str) -> ParsedAnswer:
        return _parse(part, depth + 1)

    simple = _simple(text, parse)
    if simple is not None:
        return simple
    if "\\ldots" in text or "..." in text:
        return Unparsed(text)
    parts, words = split_words(text)
    if len(parts) == 1:
        parts = split(text, ",", ";")
        words = {"and"} if len(parts) > 1 else set()
    if len(parts) > 1:
        return _parse_list(text, [part for part in parts if part], words, parse)
    if split_relations(text)[1]:
        return parse_relation(text, parse)
    compound = _compound(text, parse)
    if compound is not None:
        return compound
    if (with_unit := with_text_unit(text)) is None or _AMBIGUOUS.fullmatch(text):
        return Unparsed(text)
    shorter, unit = split_units(with_unit)
    if shorter != text:
        parsed = parse(shorter)
        return replace(parsed, unit=unit) if unit and isinstance(parsed, Value) else parsed
    if "\\text" in text or _DROPPED.search(text) or _TOO_MUCH.search(text) or text.count(":") > 1:
        return Unparsed(text)
    value = parse_expression(text)
    if isinstance(value, (sympy.MatrixBase, sympy.MatrixExpr)):
        matrix = value.doit()
        if isinstance(matrix, sympy.MatrixBase):
            return Table(tuple(tuple(Value(entry) for entry in row) for row in matrix.tolist()))
        return Unparsed(text)
    if value is not None and _CAPITALS.fullmatch(text):
        return Letters(text, value)
    return Unparsed(text) if value is None else Value(value, is_decimal=_is_decimal(text))


def _is_decimal(text: str) -> bool:
    """Whether it has a decimal point and is no quotient: it may be rounded."""
    return _POINT.search(text) is not None and "\\frac" not in text and "/" not in text


def _simple(text: str, parse: ParsePart) -> ParsedAnswer | None:
    """What is read from the text alone: the empty set, a number, a numeral, words."""
    if text == "\\emptyset":
        return Items(())
    if text in ("\\mathbb{R}", "\\mathbf{R}"):
        return parsed_set([WHOLE])
    if (number := number_value(text)) is not None:
        return Value(sympy.Rational(number.numerator, number.denominator), is_decimal=_is_decimal(text))
    if match := _CLOCK.fullmatch(text):
        return Clock(int(match[1]), int(match[2]), (match[3] or "").lower())
    if match := _NUMERAL.fullmatch(text) or _SPOKEN_NUMERAL.fullmatch(text) or _BARE_NUMERAL.fullmatch(text):
        named = [name for key, name in match.groupdict().items() if key != "digits" and name]
        base = int(named[0]) if named[0].isdigit() else _BASES.get(named[0])
        digits = match["digits"]
        if base == 10 and digits.isdigit():
            return parse(digits)
        if base is not None and (digits.isdigit() or (base > 10 and len(digits) > 1)):  # A_2 is a variable
            return Numeral(digits.lstrip("0") or "0", base)
    if _DATE.fullmatch(text):
        return Words(text.lower())
    words = as_words(text)
    return None if words is None or with_text_unit(text) != text else _parse_words(words, parse)


def _parse_words(words: str, parse: ParsePart) -> ParsedAnswer:
    """A single letter, the reals, the empty set, a choice, names side by side, or other words."""
    if len(words) == 1 or not re.search(r"[a-zA-Z]{2}", words):
        return parse(words)
    if choice := _CHOICE.fullmatch(words):
        return parse(choice[1])
    parts = _ENUMERATION.split(words)
    if len(parts) > 1 and all(part and len(part.split()) <= 2 and part.isascii() for part in parts):
        return Items(tuple(parse(f"\\text{{{part}}}") for part in parts))
    words = words.lower()
    if words in ("all real numbers", "all reals", "the set of all real numbers"):
        return parsed_set([WHOLE])
    if words.startswith("no "):
        words = words.rstrip("s")  # solution, or solutions
    return Items(()) if words in ("empty set", "the empty set") else Words(words)


def _compound(text: str, parse: ParsePart) -> ParsedAnswer | None:
    """Unions, differences, brackets, matrices and both signs; None for a single expression."""
    for mark in ("\\cup", "\\cap", "\\setminus", "\\backslash"):
        parts = split(text, mark)
        if len(parts) > _MAX_PARTS:
            return Unparsed(text)
        if len(parts) > 1:
            return _combined(text, mark, [parse(part) for part in parts])
    if brackets := bracketed(text):
        return _parse_brackets(text, *brackets, parse)
    if (matrix := _MATRIX.fullmatch(text)) and "\\begin" not in matrix[2]:
        rows = [row for row in split(matrix[2].strip(), "\\\\") if row]
        return Table(tuple(tuple(parse(cell) for cell in split(row, "&")) for row in rows))
    if "\\pm" in text or "\\mp" in text:
        both = [text.replace("\\pm", a).replace("\\mp", b) for a, b in (("+", "-"), ("-", "+"))]
        return _items([parse(side) for side in both])
    return None


def _combined(text: str, mark: str, parsed_parts: list[ParsedAnswer]) -> ParsedAnswer:
    """The union, intersection or difference of sets of reals."""
    pieces = [pieces_of(parsed) for parsed in parsed_parts]
    if any(piece is None for piece in pieces):
        return Unparsed(text)
    try:
        result = union(pieces[0] or [])
        for piece in pieces[1:]:
            other = union(piece or [])
            if mark == "\\cup":
                result = union(result + other)
            else:
                result = intersection(result, other if mark == "\\cap" else complement(other))
        return parsed_set(result)
    except NotComparedError:
        return Unparsed(text)


def _parse_brackets(text: str, opening: str, content: str, closing: str, parse: ParsePart) -> ParsedAnswer:
    if opening == "\\{":
        return _parse_braces(text, content, closing, parse)
    parts = split(content, ",")
    if len(parts) == 1 or len(parts) > _MAX_PARTS or not all(parts):
        plain = (opening, closing) in (("(", ")"), ("[", "]"))
        return parse(content) if plain and len(parts) == 1 else Unparsed(text)
    items = tuple(parse(part) for part in parts)
    if len(parts) > 2 or (opening, closing) in (("(", ")"), ("\\langle", "\\rangle")):
        matching = (opening, closing) in (("(", ")"), ("[", "]"), ("\\langle", "\\rangle"))
        return Point(items) if matching else Unparsed(text)
    low, high = items
    if opening not in "([" or closing not in ")]" or not (isinstance(low, Value) and isinstance(high, Value)):
        return Unparsed(text)
    low_closed = opening == "[" and not is_infinite(low.expression)
    high_closed = closing == "]" and not is_infinite(high.expression)
    if not low_closed and not high_closed:
        return Point(items)
    return Reals((Piece(low.expression, low_closed, high.expression, high_closed),))


def _parse_braces(text: str, content: str, closing: str, parse: ParsePart) -> ParsedAnswer:
    """A set: its elements (one alone stands for itself), or the condition on them."""
    if closing != "\\}":
        return Unparsed(text)
    for mark in ("\\mid", ":", "|"):
        condition = split(content, mark)
        if len(condition) == 2:
            return parse(condition[1])

    def element(part: str) -> ParsedAnswer:
        found = parse(part)
        is_set = part.startswith("\\{") and bracketed(part) is not None
        return Items((found,)) if is_set and not isinstance(found, Items) else found

    parts = [part for part in split(content, ",", ";") if part]  # not read as one: 1,234 are two here
    if len(parts) > 1:
        found = _parse_list(text, parts, {"and"}, element)
        return Items((found,)) if isinstance(found, (Point, Reals)) else found
    found = element(content)
    if isinstance(found, Items) and ("\\pm" in content or len(split_words(content)[0]) > 1):
        return found
    return Items((found,)) if isinstance(found, (Items, Point, Reals)) else found


def _items(parsed_parts: list[ParsedAnswer]) -> ParsedAnswer:
    return parsed_parts[0] if len(parsed_parts) == 1 else Items(tuple(parsed_parts))


def _is_interval(parsed: ParsedAnswer) -> bool:
    """A set of reals, and no point: an open interval without end is read as a pair."""
    if isinstance(parsed, Point):
        return any(isinstance(end, Value) and is_infinite(end.expression) for end in parsed.items)
    return isinstance(parsed, Reals)


def _parse_list(text: str, parts: list[str], words: set[str], parse: ParsePart) -> ParsedAnswer:
    """Answers side by side: solutions in any order, values of several names, or conditions on one variable."""
    if len(parts) > _MAX_PARTS:
        return Unparsed(text)
    parsed_parts = [parse(part) for part in parts]
    unknowns = {unknown_of(part) for part in parts}
    pieces = [pieces_of(parsed) for parsed in parsed_parts]
    if None not in unknowns or ("or" in words and any(_is_interval(parsed) for parsed in parsed_parts)):
        if len(unknowns) > 1 or any(piece is None for piece in pieces):
            return Unparsed(text)
        found = _combined(text, "\\cup" if "or" in words else "\\cap", parsed_parts)
        # x < -2, x > 2: hardly the empty set
        return Unparsed(text) if found == Items(()) else found
    names = [assigned_name(part) for part in parts]
    given = [name for name in names if name]
    quantities = {_INDEX.sub("", name) for name in given}
    if len(given) == len(parts) == len(quantities):
        # x = 1, y = 2: the point of the values in the order of their names
        ordered = sorted(zip(given, parsed_parts, strict=True), key=lambda pair: pair[0])
        return Point(tuple(parsed for _, parsed in ordered))
    if len(quantities) > 1:
        return Unparsed(text)
    flat: list[ParsedAnswer] = []
    for part, parsed in zip(parts, parsed_parts, strict=True):
        is_several = isinstance(parsed, Items) and parsed.items and not part.startswith("\\{")
        flat += parsed.items if is_several and isinstance(parsed, Items) else [parsed]
    return _items(flat)
