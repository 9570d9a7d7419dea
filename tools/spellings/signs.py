"""Signs around and inside a number: dashes, degrees, Unicode, dots, units; and words."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import cycle

from .writing import Spelt, decimal, fraction, proper

# --- dashes for minus signs


def dash_same(rng: random.Random) -> Spelt:
    for dash in cycle("–−—﹣－"):
        value, a, b = proper(rng), rng.randint(2, 9), rng.randint(2, 9)
        yield f"{dash}{a}", f"-{a}"
        yield dash + fraction(value), fraction(-value)
        yield f"{a}x {dash} {b}", f"{a}x-{b}"
        yield f"({dash}{a}, {b})", f"(-{a},{b})"


def dash_other(rng: random.Random) -> Spelt:
    for dash in cycle("–−—﹣－"):
        value, a, b = proper(rng), rng.randint(2, 9), rng.randint(2, 9)
        yield f"{dash}{a}", str(a)
        yield dash + fraction(value), fraction(value)
        yield f"{a}x {dash} {b}", f"{a}x+{b}"
        yield f"({dash}{a}, {b})", f"({a},{b})"


# --- degrees

_COSINE = {60: Fraction(1, 2), 120: Fraction(-1, 2), 180: Fraction(-1), 90: Fraction(0), 0: Fraction(1)}
_SINE = {30: Fraction(1, 2), 150: Fraction(1, 2), 210: Fraction(-1, 2), 270: Fraction(-1)}


def degrees_same(rng: random.Random) -> Spelt:
    while True:
        angle = rng.randint(1, 359)
        yield f"{angle}°", str(angle)
        yield f"{angle}^\\circ", f"{angle}^{{\\circ}}"
        yield f"{angle} \\text{{ degrees}}", f"{angle}^\\circ"
        known = rng.choice(list(_COSINE))
        yield f"\\cos {known}^\\circ", decimal(_COSINE[known])
        known = rng.choice(list(_SINE))
        yield f"\\sin({known}^{{\\circ}})", fraction(_SINE[known]) if _SINE[known] != -1 else "-1"
        yield f"{angle}.5°", f"\\frac{{{2 * angle + 1}}}{{2}}"
        yield "\\tan 45°", "1"


def degrees_other(rng: random.Random) -> Spelt:
    while True:
        angle = rng.randint(1, 359)
        yield f"{angle}°", str(angle + 1)
        yield f"{angle}^\\circ", f"-{angle}^\\circ"
        known = rng.choice(list(_COSINE))
        yield f"\\cos {known}^\\circ", decimal(_COSINE[known] + Fraction(1, 4))
        known = rng.choice(list(_SINE))
        yield f"\\sin {known}", decimal(_SINE[known])  # radians
        yield f"{angle}° \\text{{ and }} {angle + 1}°", f"{angle}"


# --- fractions and roots of Unicode

_GLYPHS = {
    "½": (1, 2),
    "⅓": (1, 3),
    "¼": (1, 4),
    "¾": (3, 4),
    "⅔": (2, 3),
    "⅕": (1, 5),
    "⅜": (3, 8),
    "⅞": (7, 8),
}


def unicode_same(rng: random.Random) -> Spelt:
    while True:
        glyph = rng.choice(list(_GLYPHS))
        value, whole, n = Fraction(*_GLYPHS[glyph]), rng.randint(1, 9), rng.choice([2, 3, 5, 6, 7, 11, 13])
        yield glyph, fraction(value)
        yield f"{whole}{glyph}", fraction(whole + value)
        yield f"√{n}", f"\\sqrt{{{n}}}"
        yield f"{whole + 1}√{n}", f"\\sqrt{{{(whole + 1) ** 2 * n}}}"
        yield f"√({n}+{whole})/2", f"\\frac{{\\sqrt{{{n + whole}}}}}{{2}}"
        yield f"{whole}π", f"{whole}\\pi"
        yield f"x² + {whole}", f"x^2+{whole}"
        yield f"{whole} × {n}", str(whole * n)


def unicode_other(rng: random.Random) -> Spelt:
    while True:
        glyph = rng.choice(list(_GLYPHS))
        value, whole, n = Fraction(*_GLYPHS[glyph]), rng.randint(1, 9), rng.choice([2, 3, 5, 6, 7, 11, 13])
        yield glyph, fraction(1 / value)
        yield f"{whole}{glyph}", fraction(whole - value)
        yield f"√{n}", str(n)
        yield f"{whole + 1}√{n}", f"\\sqrt{{{(whole + 1) * n}}}"
        yield f"√({n}+{whole})", f"\\sqrt{{{n}}}+{whole}"
        yield f"x² + {whole}", f"x^3+{whole}"


# --- a sentence's full stop


def dot_same(rng: random.Random) -> Spelt:
    while True:
        value, n = proper(rng), rng.randint(2, 99)
        yield f"{n}.", str(n)
        yield f"{fraction(value)}.", fraction(value)
        yield f"{n}.5.", decimal(Fraction(2 * n + 1, 2))
        yield f"({n}, {n + 1}).", f"({n},{n + 1})"
        yield f"{n}.0", str(n)
        yield f"{n}x+1.", f"1+{n}x"


def dot_other(rng: random.Random) -> Spelt:
    while True:
        value, n = proper(rng), rng.randint(2, 99)
        yield f"{n}.", str(n + 1)
        yield f"{fraction(value)}.", fraction(value + 1)
        yield f"{n}.5.", str(n)
        yield f"({n}, {n + 1}).", f"({n},{n + 2})"
        yield f"{n}.1", str(n)


# --- units behind a number

_UNITS = (
    "~\\mathrm{cm}",
    "\\,\\text{cm}",
    " \\text{ meters}",
    "\\ \\mathrm{m}^2",
    " \\mbox{ inches}^2",
    "\\,\\mathrm{km/h}",
    "\\text{ cm}^3",
    " cm",
    " \\text{ dollars}",
    "\\;\\textrm{kg}",
    " \\text{ square units}",
    "\\,\\mathrm{m/s^2}",
)


def unit_same(rng: random.Random) -> Spelt:
    for unit in cycle(_UNITS):
        value = Fraction(rng.randint(2, 99), rng.choice([1, 1, 2, 4, 5]))
        yield decimal(value) + unit, rng.choice([decimal(value), fraction(value)])
        yield f"\\${value.numerator}", str(value.numerator)
        yield f"{value.numerator}\\pi{unit}", f"{value.numerator}\\pi"


def unit_other(rng: random.Random) -> Spelt:
    for unit in cycle(_UNITS):
        value = Fraction(rng.randint(2, 99), rng.choice([1, 1, 2, 4, 5]))
        yield decimal(value) + unit, rng.choice([decimal(value + 1), fraction(value * 10), fraction(-value)])
        yield f"{value.numerator}\\pi{unit}", str(value.numerator)


# --- words

_WORDS = (
    "Monday",
    "Sunday",
    "ellipse",
    "east",
    "yes",
    "Evelyn",
    "even",
    "parabola",
    "north west",
    "no",
    "odd",
)
_SETTINGS = ("\\text{%s}", "\\textbf{%s}", "\\mathrm{%s}", "\\text{ %s }", "\\text{%s}.", "\\mbox{%s}")


def word_same(rng: random.Random) -> Spelt:
    for setting in cycle(_SETTINGS):
        word = rng.choice(_WORDS)
        yield setting % word, word
        yield setting % rng.choice(_WORDS[:1]), "\\text{monday}"
        letter = rng.choice("ABCDE")
        yield setting % f"({letter})", letter
        yield word, setting % word


def word_other(rng: random.Random) -> Spelt:
    for setting in cycle(_SETTINGS):
        word, other = rng.sample(_WORDS, 2)
        yield setting % word, other
        yield setting % word, setting % word[::-1]  # the same letters: a product of symbols is equal
        letter, wrong = rng.sample("ABCDE", 2)
        yield setting % f"({letter})", wrong
        yield setting % word, str(rng.randint(0, 9))
