"""Ways to write one number."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import cycle
from math import factorial

from .writing import Spelt, decimal, fraction


def _grouped(value: int, mark: str) -> str:
    return f"{value:,}".replace(",", mark)


# --- small numbers: a tolerance that is not relative calls them all equal


def small_same(rng: random.Random) -> Spelt:
    while True:
        mantissa, power = rng.randint(11, 99), rng.randint(8, 40)
        tenths = f"{mantissa // 10}.{mantissa % 10}"
        yield f"{tenths}\\times 10^{{-{power}}}", f"{mantissa} \\cdot 10^{{-{power + 1}}}"
        exponent, n = rng.randint(60, 120), rng.randint(15, 25)
        yield f"2^{{-{exponent}}}", f"\\frac{{1}}{{2^{{{exponent}}}}}"
        yield f"\\frac{{1}}{{{n}!}}", f"\\frac{{1}}{{{factorial(n)}}}"
        yield decimal(Fraction(mantissa, 10 ** (power % 8 + 8))), f"{tenths} \\times 10^{{-{power % 8 + 7}}}"
        big = rng.randint(1000, 2500)
        yield f"\\frac{{1}}{{{big}!}}", f"\\frac{{{big + 1}}}{{{big + 1}!}}"


def small_other(rng: random.Random) -> Spelt:
    while True:
        mantissa, power = rng.randint(11, 98), rng.randint(8, 40)
        tenths, next_tenths = (f"{m // 10}.{m % 10}" for m in (mantissa, mantissa + 1))
        yield f"{tenths}\\times 10^{{-{power}}}", f"{next_tenths}\\times 10^{{-{power}}}"
        exponent, n = rng.randint(60, 120), rng.randint(15, 25)
        yield f"2^{{-{exponent}}}", f"2^{{-{exponent + 1}}}"
        yield f"\\frac{{1}}{{{n}!}}", f"\\frac{{1}}{{{n - 1}!}}"
        half = Fraction(rng.randint(1, 9), 2)
        yield decimal(half), decimal(half + Fraction(1, 10**7))
        big = rng.randint(1000, 2500)
        yield f"\\frac{{1}}{{{big}!}}", f"\\frac{{1}}{{{big + 2}!}}"
        yield (
            f"\\frac{{1}}{{3 \\cdot 2^{{{big}}}}}",
            f"\\frac{{2^{{{big - 1}}}+1}}{{3 \\cdot 2^{{{big}}}}}",
        )
        yield f"\\sqrt{{{mantissa}}}\\cdot 10^{{-{power}}}", f"\\sqrt{{{mantissa + 1}}}\\cdot 10^{{-{power}}}"


# --- numerals with a base: the subscript is part of the answer

_BASES = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}


def _numeral(rng: random.Random) -> tuple[str, int]:
    base = rng.choice(list(_BASES))
    return "".join([str(rng.randint(1, base - 1)), *(str(rng.randrange(base)) for _ in range(3))]), base


def base_same(rng: random.Random) -> Spelt:
    while True:
        for spelling in ("%s_{%d}", "(%s)_{%d}", "%s_{\\text{%s}}", "{%s}_{%d}", "%s_{(%d)}"):
            digits, base = _numeral(rng)
            yield spelling % (digits, _BASES[base] if "text" in spelling else base), f"{digits}_{base}"


def base_other(rng: random.Random) -> Spelt:
    while True:
        digits, base = _numeral(rng)
        yield f"{digits}_{base}", f"{digits}_{{{base + 1}}}"
        other = digits[:-1] + str((int(digits[-1]) + 1) % base)
        yield f"{other}_{{{base}}}", f"{digits}_{base}"
        yield digits, f"{digits}_{base}"
        yield f"{digits}_{base}", str(int(digits, base))


# --- repeating decimals


def _repeating(value: int, period: str, mark: str) -> tuple[str, Fraction]:
    return f"{value}.{mark}{{{period}}}", value + Fraction(int(period), 10 ** len(period) - 1)


def _period(rng: random.Random) -> str:
    return rng.choice(
        [
            str(rng.randint(1, 8)),
            f"{rng.randint(10, 98)}",
            f"0{rng.randint(1, 9)}",
            f"{rng.randint(100, 998)}",
        ]
    )


def repeating_same(rng: random.Random) -> Spelt:
    for mark in cycle(("\\overline", "\\bar", "\\overline")):
        text, value = _repeating(rng.randint(0, 5), _period(rng), mark)
        yield text, fraction(value)
        digit, period = rng.randint(1, 9), rng.randint(1, 8)
        yield (
            f"0.{digit}{mark}{{{period}}}",
            f"{fraction(Fraction(digit, 10) + Fraction(period, 90))}",
        )


def repeating_other(rng: random.Random) -> Spelt:
    while True:
        period = _period(rng)
        text, value = _repeating(rng.randint(0, 5), period, "\\overline")
        yield text, fraction(value + Fraction(1, 10 ** len(period) - 1))
        yield f"0.\\overline{{{period}}}", f"0.{period}"
        yield f"0.{period}{period}", fraction(Fraction(int(period), 10 ** len(period) - 1))


# --- groups of digits


def groups_same(rng: random.Random) -> Spelt:
    for mark in cycle(("\\,", "{,}", "\\;", "~", ",\\!", "\\ ", "\u202f", ",", " ")):
        value = rng.randint(10**3, 10**8)
        yield _grouped(value, mark), str(value)


def groups_other(rng: random.Random) -> Spelt:
    for mark in cycle(("\\,", "{,}", "\\;", "~", ",\\!", "\\ ", "\u202f", ",", " ")):
        value = rng.randint(10**3, 10**8)
        yield _grouped(value, mark), str(rng.choice([value + 1, value + 1000, value * 10, value % 1000]))


# --- a letter for the power of ten


def exponent_same(rng: random.Random) -> Spelt:
    while True:
        mantissa, power = Fraction(rng.randint(11, 99), 10), rng.randint(1, 9)
        text, value = decimal(mantissa), mantissa * 10**power
        yield f"{text}e{power}", str(value)
        yield f"{text}E+{power}", f"{text}\\times 10^{{{power}}}"
        yield f"{text}e-{power}", decimal(mantissa / 10**power)
        yield f"{text}*10^{power}", str(value)
        yield f"-{text}e{power}", str(-value)


def exponent_other(rng: random.Random) -> Spelt:
    while True:
        mantissa, power = Fraction(rng.randint(11, 99), 10), rng.randint(1, 9)
        text, value = decimal(mantissa), mantissa * 10**power
        yield f"{text}e{power}", str(value * 10)
        yield f"{text}E{power}", f"{text}\\times 10^{{-{power}}}"
        yield f"{text}e-{power}", decimal(mantissa / 10 ** (power + 1))
        yield f"{text}e{power}", str(value + 1)
        yield f"{text}e-1{power}", f"{text}e-2{power}"
