"""One spelling for what answers write in many ways: dashes, digit groups, Unicode, text commands, full stops.

Strings only, no mathematics and no SymPy. `normalize_latex` keeps the value; what a text means is the parser's to say.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_laser.rewards.mathematics.boxed import MAX_ANSWER_CHARS, normalize_answer
from megatron_laser.rewards.mathematics.latex_tokens import tokens

# vulgar fractions: numerator and denominator
FRACTIONS: dict[str, tuple[int, int]] = {
    **{
        "½": (1, 2),
        "⅓": (1, 3),
        "⅔": (2, 3),
        "¼": (1, 4),
        "¾": (3, 4),
        "⅕": (1, 5),
        "⅖": (2, 5),
        "⅗": (3, 5),
    },
    **{
        "⅘": (4, 5),
        "⅙": (1, 6),
        "⅚": (5, 6),
        "⅐": (1, 7),
        "⅛": (1, 8),
        "⅜": (3, 8),
        "⅝": (5, 8),
        "⅞": (7, 8),
    },
    **{"⅑": (1, 9), "⅒": (1, 10)},
}
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ", "0123456789+-nx", strict=True))

_GREEK = {
    **dict(
        zip("αβγδεζηθ", ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"], strict=True)
    ),
    **dict(zip("ικλμνξπρ", ["iota", "kappa", "lambda", "mu", "nu", "xi", "pi", "rho"], strict=True)),
    **dict(zip("στυφχψωϕ", ["sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "phi"], strict=True)),
    **dict(
        zip(
            "ΓΔΘΛΞΠΣΦΨΩ",
            ["Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega"],
            strict=True,
        )
    ),
}
_COMMANDS = {
    "times": "×✕✖",
    "cdot": "·⋅∙",
    "le": "≤⩽≦",
    "ge": "≥⩾≧",
    "ne": "≠",
    "approx": "≈",
    "equiv": "≡",
    "infty": "∞",
    "cup": "∪",
    "cap": "∩",
    "in": "∈",
    "emptyset": "∅",
    "pm": "±",
    "mp": "∓",
    "to": "→",
    "angle": "∠",
    "ldots": "…⋯",
    "setminus": "∖",
    "langle": "⟨〈",
    "rangle": "⟩〉",
    "lfloor": "⌊",
    "rfloor": "⌋",
    "lceil": "⌈",
    "rceil": "⌉",
    "sum": "∑",
    "int": "∫",
    **{name: character for character, name in _GREEK.items()},
    "phi": "φϕ",
}
# for str.translate; a blank ends a command's name
CHARACTERS: dict[int, str] = {
    **{ord(character): f"\\{name} " for name, characters in _COMMANDS.items() for character in characters},
    **{ord(character): "-" for character in "‐‑‒–—―−﹣－➖"},
    **{ord(character): "^\\circ " for character in "°˚º"},
    **{ord(character): "'" for character in "’′‘"},
    **{ord(character): '"' for character in "“”″"},
    **{0xFF10 + digit: str(digit) for digit in range(10)},
    **{
        ord(wide): narrow
        for wide, narrow in zip("（），．＋＝＜＞｛｝［］：；％", "(),.+=<>{}[]:;%", strict=True)
    },
    ord("÷"): "/",
    ord("∕"): "/",
    ord("⁄"): "/",
    ord("ℝ"): "\\mathbb{R}",
    ord("，"): ",",
    ord("、"): ",",
    ord("。"): ".",
    ord("＊"): "*",
    ord("％"): "%",
}


MAX_NESTING = 40  # references stay below 10; parsers and regular expressions are super-linear in it
_PASSES = 8
MAX_DIGITS = 4000  # of a number that is read as one; Python's own limit is 4300

_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_INVISIBLE = re.compile(
    "[\u200b-\u200d\u2060\ufeff]|\\\\(?:displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])"
)
_SIZES = re.compile(
    r"\\(?:[bB]igg?[lrm]?|left|right)(?![a-zA-Z])\s*(?=[()\[\]|.]|\\[{}|]|\\[lr]?(?:angle|brac|vert))"
)
_SUPERSCRIPT = re.compile(f"[{''.join(SUPERSCRIPTS)}]+")
_SUBSCRIPT = re.compile(f"[{''.join(SUBSCRIPTS)}]+")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|hbox|emph|boldsymbol|bm|math(?:rm|bf|it|sf|tt))(?![a-zA-Z])\s*(?=\{)"
)
_ONE_LETTER = re.compile(r"\\text\{\s*([a-zA-Z])\s*\}(?![a-zA-Z{])")
_UNIT_LETTERS = frozenset("msghlLNJWVAKCF")
_EMPTY_TEXT = re.compile(r"\\text\{\s*\}")
_SYNONYMS = [
    (re.compile(pattern + ("" if pattern.endswith("=") else r"(?![a-zA-Z])")), replacement)
    for pattern, replacement in [
        (r"\\(?:varnothing|O)", r"\\emptyset "),
        (r"\\(?:leqslant|leqq|leq)", r"\\le "),
        (r"\\(?:geqslant|geqq|geq)", r"\\ge "),
        (r"\\(?:neq|not\s*=)", r"\\ne "),
        (r"(?<![<>=])<=", r"\\le "),
        (r"(?<![<>=])>=", r"\\ge "),
        (r"\\lt", "<"),
        (r"\\gt", ">"),
        (r"\\(?:[dtc]frac)", r"\\frac"),
        (r"\\lbrace", r"\\{"),
        (r"\\rbrace", r"\\}"),
        (r"\\lbrack", "["),
        (r"\\rbrack", "]"),
        (r"\\(?:land|wedge)", r"\\text{and}"),
        (r"\\(?:lor|vee)", r"\\text{or}"),
        (r"\\(?:degree|textdegree)", r"^\\circ "),
        (r"\\(?:quad|qquad)", " "),
        (r"\\pmod\s+(\d+)", r"\\pmod{\1}"),
        (r"\\(?:dots|cdots|dotsc|dotsb)", r"\\ldots "),
        (r"\\(?:R|reals)", r"\\mathbb{R}"),
    ]
]
_OTHER_EMPTY_SET = re.compile(r"\\\{\s*\\\}")
_THIN = r"(?:\\[,;: ]|~|\{,\}|\{\s\}|\s)"
_GROUPS = re.compile(rf"(?<![\d.])([1-9]\d{{0,2}})((?:{_THIN}+\d{{3}})+)(?![\d]|{_THIN}*\d)")
_COMMA_GROUPS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_BLANK_COMMAND = re.compile(r"(?<!\\)\\[,;:! ]|~")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))")
_DOTTED = re.compile(r"(\.\d*)\\dot\s*\{?\s*(\d)\s*\}?\s*(\d*)\s*\\dot\s*\{?\s*(\d)\s*\}?")
_BRACKETED_PERIOD = re.compile(r"(\d*\.)\((\d+)\)$")  # 0.(3); the brackets of 0.1(6) may hold a factor
_REWRITTEN = [
    (re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in)\s*\]"), r"\\\\ "),  # a line's distance
    (re.compile(r"(?<=\d)\s*\^\s*(?:\{\s*o\s*\}|o)(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\{\s*([^{}]+?)\s*\\choose\s*([^{}]+?)\s*\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)"), r" \\times "),
]
_ARGUMENT_GROUPS = re.compile(r"(?:(?<=frac\{)|(?<=sqrt\{)|(?<=\}\{))[1-9]\d{0,2}(?:,\d{3})+(?=\})")
_ROOT_OF_FRACTION = re.compile(r"\\sqrt\s*(\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})")
_E_NOTATION = re.compile(r"(?<![\w.}])((?:\d+\.?\d*|\.\d+))[eE](?:\{?)([+-]?\d{1,6})(?:\}?)(?![\w.])")
_ROOT = re.compile(r"([√∛∜])\s*(?:(\d+(?:\.\d+)?|\\[a-zA-Z]+|[a-zA-Z])|(?=[({]))")
_PLAIN_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt(?=\s*[({])")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_COMMAND = r"\\(?!frac|sqrt|text|left|math)[a-zA-Z]+"
_SHORT_ARGUMENT = re.compile(rf"\\frac\s*(?:(\d|[a-zA-Z]|{_COMMAND})|(?=\{{))\s*")
_SHORT_DENOMINATOR = re.compile(rf"\d|[a-zA-Z]|{_COMMAND}")
_LONG_POWER = re.compile(r"\^\s*(\d{2,}|-\d+)")
_BLANKS = re.compile(r"\s+")
_ELLIPSIS = re.compile(r"\.(?:\s?\.)+")  # 0.333... has more digits than 0.333
_END = re.compile(r"(?:[.,;:\s]|\\\\)+$")

_INTEGER = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_QUOTIENT = re.compile(r"([+-]?) ?(?:\\frac ?\{ ?(-?[0-9]+) ?\} ?\{ ?(-?[0-9]+) ?\}|([0-9]+) ?/ ?([0-9]+))")
_MIXED = re.compile(r"([+-]?)([0-9]+) ?(?:\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))")
_SCIENTIFIC = re.compile(r"(.+?) ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{ ?([+-]?[0-9]{1,5}) ?\}|([0-9]))")


def normalize_latex(answer: str) -> str:
    r"""The answer in one spelling: LaTeX in ASCII, single blanks, `\text` for all text commands, no group marks.

    Doing it twice changes nothing. Equal results mean the same answer; different results mean nothing.
    """
    if len(answer) > MAX_ANSWER_CHARS or nesting(answer) > MAX_NESTING:
        return answer
    for _ in range(_PASSES):
        previous, answer = answer, _pass(answer)
        if previous == answer:
            break
    return answer


def nesting(text: str) -> int:
    """How deep its brackets go."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _pass(text: str) -> str:
    text = _INVISIBLE.sub("", normalize_answer(text))
    text = _characters(_SPACES.sub(" ", text))
    text = _SIZES.sub("", text)
    text = _TEXT.sub(r"\\text", text)
    text = _EMPTY_TEXT.sub(" ", _ONE_LETTER.sub(_bare_letter, text))
    text = _ELLIPSIS.sub(r"\\ldots ", text)
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text = _OTHER_EMPTY_SET.sub(r"\\emptyset ", text)
    text = _GROUPS.sub(lambda groups: re.sub(r"\D", "", groups.group()), text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = _ARGUMENT_GROUPS.sub(lambda groups: groups.group().replace(",", ""), _comma_groups(text))
    text = _BLANK_COMMAND.sub(" ", text)
    text = _DOTTED.sub(r"\1\\overline{\2\3\4}", text)
    text = _BRACKETED_PERIOD.sub(r"\1\\overline{\2}", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = _E_NOTATION.sub(r"\1 \\times 10^{\2}", text)
    text = _ROOT_OF_FRACTION.sub(r"\\sqrt{\1}", _braced_fractions(text))
    text = _LONG_POWER.sub(r"^{\1}", text)
    text = _END.sub("", _BLANKS.sub(" ", text).strip())
    return _without_outer_braces(text)


def _characters(text: str) -> str:
    text = _roots(_PLAIN_ROOT.sub("√", text))
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda run: "^{" + "".join(SUPERSCRIPTS[c] for c in run.group()) + "}", text)
    text = _SUBSCRIPT.sub(lambda run: "_{" + "".join(SUBSCRIPTS[c] for c in run.group()) + "}", text)
    for character, (above, below) in FRACTIONS.items():
        text = text.replace(character, f"\\frac{{{above}}}{{{below}}}")
    return text.translate(CHARACTERS)


def _roots(text: str) -> str:
    r"""`√2` and `√(2+3)` as `\sqrt{2}` and `\sqrt{2+3}`."""
    while match := _ROOT.search(text):
        start, end = match.span()
        if match[2]:
            text = f"{text[:start]}{_ROOTS[match[1]]}{{{match[2]}}}{text[end:]}"
            continue
        closing = closing_bracket(text, end)
        if closing is None:
            return text
        text = f"{text[:start]}{_ROOTS[match[1]]}{{{text[end + 1 : closing]}}}{text[closing + 1 :]}"
    return text


def _bare_letter(match: re.Match[str]) -> str:
    r"""`\mathrm{e}` is the letter; `12\,\mathrm{m}` keeps its unit."""
    before = _BLANK_COMMAND.sub(" ", match.string[: match.start()]).rstrip()
    is_unit = match[1] in _UNIT_LETTERS and before != "" and (before[-1].isalnum() or before[-1] in "})/")
    return match.group() if is_unit else f" {match[1]}"


def closing_bracket(text: str, opening: int) -> int | None:
    """Where the bracket at `opening` is closed by one of any kind; None if it is not."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] in "([{":
            depth += 1
        elif text[position] in ")]}":
            depth -= 1
            if depth == 0:
                return position
    return None


def _comma_groups(text: str) -> str:
    r"""`10,080` as one number outside brackets; inside them, or beside a comma and a blank, it is a list."""
    if "," not in text or re.search(r",\s", text):
        return text
    outside = {position for _, position, free in tokens(text) if free}
    return _COMMA_GROUPS.sub(
        lambda groups: groups.group().replace(",", "") if groups.start() in outside else groups.group(), text
    )


def _repeating_fraction(match: re.Match[str]) -> str:
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    if len(whole + fixed + period) > MAX_DIGITS // 2:
        return match.group()
    value = Fraction(int(whole + fixed)) + Fraction(int(period), 10 ** len(period) - 1)
    value /= 10 ** len(fixed)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _braced_fractions(text: str) -> str:
    r"""`\frac12`, `\frac\pi2` and `\frac{1}2` as `\frac{1}{2}`."""
    if "\\frac" not in text:
        return text
    pieces, position = [], 0
    for match in _SHORT_ARGUMENT.finditer(text):
        if match.start() < position:
            continue
        end = match.end()
        if match[1]:
            above = match[1]
        else:
            closing = closing_bracket(text, end)
            if closing is None:
                break
            above, end = text[end + 1 : closing], closing + 1
            while end < len(text) and text[end] == " ":
                end += 1
        if below := _SHORT_DENOMINATOR.match(text, end):
            pieces += [text[position : match.start()], f"\\frac{{{above}}}{{{below.group()}}}"]
            position = below.end()
        elif match[1]:
            pieces += [text[position : match.start()], f"\\frac{{{above}}}"]
            position = end
    return "".join(pieces) + text[position:]


def _without_outer_braces(text: str) -> str:
    while text.startswith("{") and text.endswith("}") and closing_bracket(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def number_value(text: str) -> Fraction | None:
    r"""The exact value of a number in normalised LaTeX, such as `-3`, `.5`, `\frac{1}{2}`, `1/2`, `1\frac{4}{5}`.

    None for anything else, also where digits or powers are too many to be worth it (MAX_DIGITS).
    """
    if len(text) > MAX_DIGITS:
        return None
    if _INTEGER.fullmatch(text):
        return Fraction(int(text))
    if _DECIMAL.fullmatch(text):
        return Fraction(text.rstrip(".")) if text.rstrip(".") not in ("", "+", "-") else None
    if match := _QUOTIENT.fullmatch(text):
        above, below = int(match[2] or match[4]), int(match[3] or match[5])
        return None if below == 0 else Fraction(-above if match[1] == "-" else above, below)
    if match := _MIXED.fullmatch(text):
        above, below = int(match[3] or match[5]), int(match[4] or match[6])
        if below == 0:
            return None
        value = int(match[2]) + Fraction(above, below)
        return -value if match[1] == "-" else value
    if match := _SCIENTIFIC.fullmatch(text):
        mantissa, power = number_value(match[1]), int(match[2] or match[3])
        if mantissa is None or abs(power) > MAX_DIGITS or "10^" in match[1]:
            return None
        return mantissa * Fraction(10) ** power
    return None
