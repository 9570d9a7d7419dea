"""How exact values are written: decimals and LaTeX fractions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

# (answer, reference), without end
Spelt = Iterator[tuple[str, str]]


def decimal(value: Fraction) -> str:
    """A terminating decimal, exact."""
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    scaled = f"{abs(value * 10**digits).numerator:0{digits + 1}d}"
    sign = "-" if value < 0 else ""
    return sign + (f"{scaled[:-digits]}.{scaled[-digits:]}" if digits else scaled)


def fraction(value: Fraction) -> str:
    r"""As \\frac{a}{b}, the sign in front."""
    sign = "-" if value < 0 else ""
    return sign + f"\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def proper(rng: random.Random, denominators: tuple[int, ...] = (3, 5, 7, 8, 9, 11, 12)) -> Fraction:
    """A seeded fraction that is no integer."""
    while True:
        value = Fraction(rng.randint(1, 30), rng.choice(denominators))
        if value.denominator > 1:
            return value
