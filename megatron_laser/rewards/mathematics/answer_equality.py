"""Whether two parsed answers are the same: the one relation behind grades and votes. Symmetric, in three values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import sympy

from megatron_laser.rewards.mathematics.answer_types import (
    Clock,
    Equation,
    Inequality,
    Items,
    Letters,
    Numeral,
    ParsedAnswer,
    Piece,
    Point,
    Reals,
    Statement,
    Table,
    Unparsed,
    Value,
    Words,
)
from megatron_laser.rewards.mathematics.expression_equality import expressions_equal, proportional


def parsed_answers_equal(left: ParsedAnswer, right: ParsedAnswer) -> bool | None:
    """True, False, or None where it cannot be decided."""
    if left == right:
        return True
    match left, right:
        case (Unparsed(), _) | (_, Unparsed()):
            return None
        case Value(first, unit), Value(second, other_unit):
            same = expressions_equal(first, second, (left.is_decimal, right.is_decimal))
            if not unit or not other_unit or unit == other_unit or _is_scale_left_out(unit, other_unit):
                return same
            return None if same is not False and "?" in (unit[0], other_unit[0]) else False
        case (Letters(), _) | (_, Letters()):
            return _letters_equal(left, right)
        case (Clock(), _) | (_, Clock()):
            return _clocks_equal(left, right)
        case Point(first), Point(second):
            return _all_equal(first, second)
        case Items(first), Items(second):
            return _same_items(first, second)
        case Reals(first), Reals(second):
            return _same_pieces(first, second)
        case Table(first), Table(second):
            if [len(row) for row in first] != [len(row) for row in second]:
                return False
            return _all_equal(
                [cell for row in first for cell in row], [cell for row in second for cell in row]
            )
        case Equation(first), Equation(second):
            return _multiples(first, second, both_signs=True)
        case Inequality(first, strict), Inequality(second, other_strict):
            return False if strict != other_strict else _multiples(first, second, both_signs=False)
        case (Words(text), Items(())) | (Items(()), Words(text)) if re.match(r"no(?:ne)?\b", text):
            return None  # no solution: the empty set?
        case (Words() | Numeral() | Statement(), _) | (_, Words() | Numeral() | Statement()):
            return False
        case (Equation(zero), _) | (_, Equation(zero)):
            # one variable: its solutions may be the other answer
            return None if len(zero.free_symbols) < 2 else False
        case (Inequality(positive, _), _) | (_, Inequality(positive, _)):
            return None if len(positive.free_symbols) < 2 else False
        case (Table(), Point()) | (Point(), Table()):
            return None  # a vector, or not
        case (Items(items), Reals()) | (Reals(), Items(items)) if any(
            isinstance(item, (Reals, Point)) for item in items
        ):
            return None  # intervals side by side may be their union
    return False


def _letters_equal(left: ParsedAnswer, right: ParsedAnswer) -> bool | None:
    """Two texts of capitals: the same letters in another order may be a product, a line or another name."""
    if isinstance(left, Letters) and isinstance(right, Letters):
        return None if sorted(left.text) == sorted(right.text) else False
    values = (Value(side.product) if isinstance(side, Letters) else side for side in (left, right))
    return parsed_answers_equal(*values)


def _clocks_equal(left: ParsedAnswer, right: ParsedAnswer) -> bool | None:
    """Times are the same or not; what only their ratios have in common is undecided, and so is a time in words."""
    if isinstance(left, Words) or isinstance(right, Words):
        return None
    if isinstance(left, Clock) and isinstance(right, Clock):
        if (left.hour, left.minute) == (right.hour, right.minute):
            return None if "" in (left.half, right.half) else left.half == right.half
        if left.half or right.half:
            return False
    first, second = (_ratio(side) if isinstance(side, Clock) else side for side in (left, right))
    return None if parsed_answers_equal(first, second) is not False else False


def _ratio(time: Clock) -> ParsedAnswer:
    return Value(sympy.Rational(time.hour, time.minute)) if time.minute else Unparsed(f"{time.hour}:00")


def _is_scale_left_out(unit: str, other: str) -> bool:
    """Degrees of a temperature, where only one side says of which scale."""
    return "°" in (unit, other) and unit[0] == other[0]


def _all_equal(first: Sequence[ParsedAnswer], second: Sequence[ParsedAnswer]) -> bool | None:
    if len(first) != len(second):
        return False
    return _conjunction(parsed_answers_equal(a, b) for a, b in zip(first, second, strict=True))


def _conjunction(verdicts: Iterable[bool | None]) -> bool | None:
    decided: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            decided = None
    return decided


def _same_items(first: Sequence[ParsedAnswer], second: Sequence[ParsedAnswer]) -> bool | None:
    """Each item with one of its own on the other side, in any order."""
    if len(first) != len(second):
        return False
    verdict = cache(lambda i, j: parsed_answers_equal(first[i], second[j]))
    if _can_be_paired(len(first), lambda i, j: verdict(i, j) is True):
        in_order = all(verdict(place, place) for place in range(len(first)))
        # names in a row may be a ranking
        return (
            True if in_order or len(first) < 3 or not all(isinstance(item, Words) for item in first) else None
        )
    return None if _can_be_paired(len(first), lambda i, j: verdict(i, j) is not False) else False


def _can_be_paired(count: int, fits: Callable[[int, int], bool]) -> bool:
    """Whether each of `count` items has one of its own among as many others (augmenting paths)."""
    partners: dict[int, int] = {}

    def place(item: int, tried: set[int]) -> bool:
        for other in (*range(item, count), *range(item)):  # most lists have the same order
            if other not in tried and fits(item, other):
                tried.add(other)
                if other not in partners or place(partners[other], tried):
                    partners[other] = item
                    return True
        return False

    return all(place(item, set()) for item in range(count))


def _same_pieces(first: Sequence[Piece], second: Sequence[Piece]) -> bool | None:
    if [(a.low_closed, a.high_closed) for a in first] != [(b.low_closed, b.high_closed) for b in second]:
        return False
    return _conjunction(
        expressions_equal(*ends)
        for a, b in zip(first, second, strict=True)
        for ends in ((a.low, b.low), (a.high, b.high))
    )


def _multiples(first: Any, second: Any, *, both_signs: bool) -> bool | None:
    """Whether two left sides of `... = 0` are multiples of one another; polynomials that are none differ."""
    if first.free_symbols != second.free_symbols:
        return False
    sign = proportional(first, second)
    if sign is None:
        return None
    if sign != 0:
        return both_signs or sign > 0
    symbols = first.free_symbols
    return False if first.is_polynomial(*symbols) and second.is_polynomial(*symbols) else None
