"""Unions of intervals: in order, joined, intersected. Ends are SymPy constants; None where they cannot be compared."""

from __future__ import annotations

from functools import cmp_to_key
from typing import Any

import sympy

from megatron_laser.rewards.mathematics.answer_types import Items, ParsedAnswer, Piece, Point, Reals, Value
from megatron_laser.rewards.mathematics.expression_equality import expressions_equal, less
from megatron_laser.rewards.mathematics.expression_parser import is_constant

WHOLE = Piece(-sympy.oo, False, sympy.oo, False)


class NotComparedError(Exception):
    """Two ends cannot be put in order."""


def pieces_of(parsed: ParsedAnswer) -> list[Piece] | None:
    """The intervals of what can be a set of reals; None for what cannot."""
    match parsed:
        case Reals(pieces):
            return list(pieces)
        case Value(end) if is_constant(end):
            return [Piece(end, True, end, True)]
        case Items(items):
            found: list[Piece] = []
            for item in items:
                if not isinstance(item, Value) or not is_constant(item.expression):
                    return None
                found.append(Piece(item.expression, True, item.expression, True))
            return found
        case Point((Value(low), Value(high))) if is_constant(low) and is_constant(high) and less(low, high):
            return [Piece(low, False, high, False)]
    return None


def parsed_set(pieces: list[Piece]) -> ParsedAnswer:
    """The answer that a union is: a value, values, an open interval (a Point), or Reals."""
    if all(piece.low == piece.high for piece in pieces):
        values = tuple(Value(piece.low) for piece in pieces)
        return values[0] if len(values) == 1 else Items(values)
    if len(pieces) == 1 and not pieces[0].low_closed and not pieces[0].high_closed:
        return Point((Value(pieces[0].low), Value(pieces[0].high)))
    return Reals(tuple(pieces))


def union(pieces: list[Piece]) -> list[Piece]:
    """Disjoint and in order.

    Raises:
        NotComparedError: see there.
    """
    joined: list[Piece] = []
    for piece in sorted(pieces, key=cmp_to_key(_compare_lows)):
        if joined and _touch(joined[-1], piece):
            last = joined.pop()
            order = _order(last.high, piece.high)
            high, closed = (
                (last.high, last.high_closed or (order == 0 and piece.high_closed))
                if order >= 0
                else (piece.high, piece.high_closed)
            )
            low_closed = last.low_closed or (_order(last.low, piece.low) == 0 and piece.low_closed)
            piece = Piece(last.low, low_closed, high, closed)
        joined.append(piece)
    return joined


def intersection(first: list[Piece], second: list[Piece]) -> list[Piece]:
    """What is in both unions.

    Raises:
        NotComparedError: see there.
    """
    found = []
    for a in first:
        for b in second:
            order = _order(a.low, b.low)
            low = a.low if order >= 0 else b.low
            low_closed = (a.low_closed or order < 0) and (b.low_closed or order > 0)
            order = _order(a.high, b.high)
            high = a.high if order <= 0 else b.high
            high_closed = (a.high_closed or order > 0) and (b.high_closed or order < 0)
            order = _order(low, high)
            if order < 0 or (order == 0 and low_closed and high_closed):
                found.append(Piece(low, low_closed, high, high_closed))
    return union(found)


def complement(pieces: list[Piece]) -> list[Piece]:
    """The reals outside a union.

    Raises:
        NotComparedError: see there.
    """
    rest = [WHOLE]
    for piece in pieces:
        outside = []
        if piece.low != -sympy.oo:
            outside.append(Piece(-sympy.oo, False, piece.low, not piece.low_closed))
        if piece.high != sympy.oo:
            outside.append(Piece(piece.high, not piece.high_closed, sympy.oo, False))
        rest = intersection(rest, outside)
    return rest


def _order(left: Any, right: Any) -> int:
    if expressions_equal(left, right):
        return 0
    smaller = less(left, right)
    if smaller is None:
        raise NotComparedError
    return -1 if smaller else 1


def _compare_lows(first: Piece, second: Piece) -> int:
    return _order(first.low, second.low) or second.low_closed - first.low_closed


def _touch(first: Piece, second: Piece) -> bool:
    order = _order(second.low, first.high)
    return order < 0 or (order == 0 and (first.high_closed or second.low_closed))
