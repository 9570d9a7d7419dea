"""Equations, points, lists, intervals and the empty set."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import combinations, cycle

from .writing import Spelt, decimal, fraction

# --- an equation is its right side only where its left side can be that


def chain_same(rng: random.Random) -> Spelt:
    while True:
        left, right = rng.randint(2, 40), rng.randint(2, 40)
        yield f"{left}+{right}={left + right}", str(left + right)
        yield f"{rng.choice('xnkNS')} = {left}", str(left)
        yield f"m+n={left + right}", str(left + right)
        value = Fraction(left, 2 * right + 1)
        yield f"\\frac{{{2 * left}}}{{{4 * right + 2}}} = {fraction(value)}", fraction(value)
        yield f"f({right}) = {left}", str(left)


def chain_other(rng: random.Random) -> Spelt:
    while True:
        left, right = rng.randint(2, 40), rng.randint(2, 40)
        yield f"{right + 1}={right}", str(right)
        yield f"{left}+{right}={left + right + 1}", str(left + right + 1)
        yield f"{rng.choice('xnk')}={left}", str(left + 1)
        yield f"m+n={left + right}", str(left)
        yield str(right), f"\\frac{{{left}}}{{{left + 1}}}={right}"


# --- homogeneous equations are not the number 0


def plane_same(rng: random.Random) -> Spelt:
    while True:
        a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
        yield f"{a}x-{b}y+{c}z=0", f"{c}z + {a}x - {b}y = 0"
        yield f"{a}x+{b}y=0", f"{2 * a}x + {2 * b}y = 0"
        yield f"{a}x-{b}y=0", f"{b}y = {a}x"
        yield f"-{a}x+{b}y-{c}z=0", f"{a}x - {b}y + {c}z = 0"


def plane_other(rng: random.Random) -> Spelt:
    while True:
        a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
        yield f"{a}x-{b}y+{c}z=0", "0"
        yield "0", f"{a}x + {b}y = 0"
        yield f"{a}x+{b}y=0", f"{a}x - {b}y = 0"
        yield f"x+{b}y=0", "0"
        yield f"{a}x-{b}y+{c}z=0", f"{a}x - {b}y + {c + 1}z = 0"


# --- a point has an order, a list of solutions has none


def _two(rng: random.Random) -> tuple[int, int]:
    low = rng.randint(-9, 8)
    return low, rng.randint(low + 1, 9)


def order_same(rng: random.Random) -> Spelt:
    while True:
        low, high = _two(rng)
        yield f"{low}, {high}", f"{high},{low}"
        yield f"\\{{{high},{low}\\}}", f"{low},{high}"
        yield f"\\left({high},\\, {low}\\right)", f"({high},{low})"
        yield f"{low}\\text{{ and }}{high}", f"{high}, {low}"
        yield f"x={low} \\text{{ or }} x={high}", f"{low},{high}"
        half = Fraction(2 * low + 1, 2)
        yield f"({decimal(half)}, {high})", f"({fraction(half)}, {high})"


def order_other(rng: random.Random) -> Spelt:
    while True:
        low, high = _two(rng)
        yield f"({low},{high})", f"{high},{low}"
        yield f"({low},{high})", f"({high},{low})"
        yield f"{high},{low}", f"({low},{high})"
        yield f"{low},{high}", f"{low},{high + 1}"
        yield f"{low},{high}", f"{low},{high},{high + 2}"
        yield f"[{low},{high}]", f"({low},{high})"


# --- inequalities and intervals


def interval_same(rng: random.Random) -> Spelt:
    while True:
        low, high = _two(rng)
        yield f"x \\ge {low}", f"[{low},\\infty)"
        yield f"{low} \\le x < {high}", f"[{low},{high})"
        yield f"[{low},{high}]", f"{low} \\leq t \\leq {high}"
        yield f"x < {high}", f"(-\\infty, {high})"
        yield f"x \\in ({low},{high}]", f"{low} < x \\le {high}"
        yield f"x<{low} \\text{{ or }} x>{high}", f"(-\\infty,{low})\\cup({high},\\infty)"
        yield f"{low}<x<{high}", f"({low},{high})"
        yield f"{high} > x \\geqslant {low}", f"[{low}, {high})"


def interval_other(rng: random.Random) -> Spelt:
    while True:
        low, high = _two(rng)
        yield f"x > {low}", f"[{low},\\infty)"
        yield f"{low} \\le x \\le {high}", f"[{low},{high})"
        yield f"[{low},{high}]", f"{low} \\leq x \\leq {high + 1}"
        yield f"x \\le {low}", f"[{low},\\infty)"
        yield f"x<{low} \\text{{ or }} x>{high}", f"({low},{high})"
        yield f"x \\ge {low}", str(low)


# --- the empty set

_EMPTY = ("\\varnothing", "\\emptyset", "\\{\\}", "\\{ \\}", "∅", "x \\in \\varnothing")


def empty_same(rng: random.Random) -> Spelt:
    both_ways = [pair for pair in combinations(_EMPTY, 2)]
    both_ways += [(b, a) for a, b in both_ways]
    rng.shuffle(both_ways)
    yield from both_ways


def empty_other(rng: random.Random) -> Spelt:
    for empty in cycle(_EMPTY):
        value = rng.randint(1, 30)
        yield empty, rng.choice(["0", f"\\{{{value}\\}}", str(value), f"({value}, \\infty)", "\\{0\\}"])
        yield (
            rng.choice([f"[{value},{value + 3}]", f"x={value}", "(-\\infty,\\infty)", f"x > {value}"]),
            empty,
        )
