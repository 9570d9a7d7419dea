"""Whether two expressions are the same, or one a multiple of the other, or smaller. Imports SymPy.

Rational constants are compared exactly, everything else numerically with a tolerance relative to its size, at several
points where there are variables; where that is impossible, math-verify's own comparison decides.
"""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from math_verify import verify
from sympy.core.function import AppliedUndef

from megatron_laser.rewards.mathematics.expression_parser import TAME_BITS, bits, is_constant, is_infinite

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off

EXACT_BITS = 200_000  # of an integer that is computed; 1/2006! has 19 thousand
_DIGITS = 60
_MAX_DIGITS = 2000
_SAME_DIGITS = 35  # equal to so many digits is equal
# numerators over 911: no simple relation holds between them by chance
_POINTS = ((1237, 701), (3571, 1409), (-857, 613), (449, -1511))


def exact_value(value: Any) -> Fraction | None:
    """The rational value of a constant built from integers by + - * / ^ !; None otherwise or beyond EXACT_BITS."""
    if isinstance(value, sympy.Rational):
        return Fraction(int(value.p), int(value.q))
    if isinstance(value, sympy.UnevaluatedExpr):
        return exact_value(value.args[0])
    if not isinstance(value, (sympy.Add, sympy.Mul, sympy.Pow, sympy.factorial)) or bits(value) > EXACT_BITS:
        return None
    parts = []
    for argument in value.args:
        part = exact_value(argument)
        if part is None:
            return None
        parts.append(part)
    if isinstance(value, sympy.Add):
        return sum(parts, Fraction(0))
    if isinstance(value, sympy.Mul):
        return math.prod(parts, start=Fraction(1))
    if isinstance(value, sympy.factorial):
        whole = parts[0].denominator == 1 and parts[0] >= 0
        return Fraction(math.factorial(int(parts[0]))) if whole else None
    base, exponent = parts
    if exponent.denominator != 1 or (base == 0 and exponent <= 0):
        return None
    return base ** int(exponent)


def expressions_equal(
    left: Any, right: Any, decimals: tuple[bool | None, bool | None] = (None, None)
) -> bool | None:
    """Whether two expressions are the same; None where it cannot be decided. Symmetric.

    Args:
        left, right: SymPy expressions.
        decimals: whether each is written as a decimal, hence may be rounded; None where that is not known.
    """
    if left == right:
        return True
    if is_infinite(left) or is_infinite(right):
        return False  # unequal ones, or one of them finite
    exact = [exact_value(side) for side in (left, right)]
    if exact[0] is not None and exact[1] is not None:
        return exact[0] == exact[1]
    size = max(bits(left), bits(right))
    if size > TAME_BITS:
        return None
    if any(side.free_symbols and side.has(sympy.Integral) for side in (left, right)):
        return None  # SymPy may search for minutes
    left, right = _computed(_without_functions(left)), _computed(_without_functions(right))
    digits = _DIGITS + int(min(0.6 * size, _MAX_DIGITS))
    agreed = 0
    for point in _points(left, right):
        first, second = (_evaluate(side, point, digits) for side in (left, right))
        if first is None or second is None:
            continue
        if not _close(first, second, digits):
            return not point and _is_rounded(first, second, exact, decimals)
        agreed += 1
        if not point:
            return True if 0.6 * size < _MAX_DIGITS else None  # a difference may be smaller than what is seen
    if agreed >= 2:
        return True
    return True if _math_verify_equal(left, right) else None


def proportional(left: Any, right: Any) -> int | None:
    """The sign of a constant c with left = c * right; 0 where there is none, None where it cannot be decided."""
    if max(bits(left), bits(right)) > TAME_BITS:
        return None
    ratios = []
    for point in _points(left, right):
        first, second = (_evaluate(side, point, _DIGITS) for side in (left, right))
        if first is not None and second is not None and second != 0:
            ratios.append(first / second)
    if len(ratios) < 2:
        return None
    if ratios[0] == 0 or any(not _close(ratio, ratios[0], _DIGITS) for ratio in ratios[1:]):
        return 0
    return 1 if sympy.re(ratios[0]) > 0 else -1


def less(left: Any, right: Any) -> bool | None:
    """Whether a constant is smaller than another; None where it cannot be decided."""
    if left == -sympy.oo or right == sympy.oo:
        return bool(left != right)
    if left == sympy.oo or right == -sympy.oo:
        return False
    exact = exact_value(left), exact_value(right)
    if exact[0] is not None and exact[1] is not None:
        return exact[0] < exact[1]
    if not (is_constant(left) and is_constant(right)) or max(bits(left), bits(right)) > TAME_BITS:
        return None
    first, second = _evaluate(left, {}, _DIGITS), _evaluate(right, {}, _DIGITS)
    if first is None or second is None or not (first.is_real and second.is_real):
        return None
    return bool(first < second)


def _without_functions(value: Any) -> Any:
    """f(x) as a variable of its own, named f(x)."""
    if not value.has(AppliedUndef):
        return value
    return value.xreplace({call: sympy.Symbol(str(call), real=True) for call in value.atoms(AppliedUndef)})


def _computed(value: Any) -> Any:
    """Sums and products with variables carried out, where SymPy can: numerically they take seconds."""
    if not value.free_symbols or not value.has(sympy.Sum, sympy.Product):
        return value
    try:
        return value.doit()
    except MemoryError:
        raise
    except Exception:  # SymPy raises anything on odd input
        return value


def _points(left: Any, right: Any) -> list[dict[Any, Any]]:
    names = sorted(left.free_symbols | right.free_symbols, key=str)
    if not names:
        return [{}]
    return [
        {name: sympy.Rational(first + place * step, 911) for place, name in enumerate(names)}
        for first, step in _POINTS
    ]


def _evaluate(value: Any, point: dict[Any, Any], digits: int) -> Any:
    """The value to so many digits, None where it has none (a pole, a sum that does not end, no accuracy)."""
    try:
        # with `subs`, even of variables that it does not hold, a nested fraction takes exponential time
        number = value.evalf(digits, subs=point if value.free_symbols else None, maxn=3 * digits + 200)
    except MemoryError:
        raise
    except Exception:  # SymPy raises anything on odd input
        return None
    if not number.is_number or number.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return None
    parts = number.as_real_imag()
    if any(not isinstance(part, (sympy.Float, sympy.Integer, sympy.Rational)) for part in parts):
        return None
    # SymPy marks a value without one correct digit, as of a sum that cancels to nothing, by a precision of 1
    parts = tuple(
        sympy.S.Zero if isinstance(part, sympy.Float) and part._prec <= 2 else part for part in parts
    )
    return parts[0] + sympy.I * parts[1] if parts[1] != 0 else parts[0]


def _close(first: Any, second: Any, digits: int) -> bool:
    """Equal relative to the larger one; a value that cancels to nothing is zero."""
    tolerance = sympy.Float(10, 30) ** -(digits - (_DIGITS - _SAME_DIGITS))
    return bool(abs(first - second) <= tolerance * max(abs(first), abs(second)))


def _is_rounded(
    first: Any, second: Any, exact: list[Fraction | None], decimals: tuple[bool | None, bool | None]
) -> bool:
    """Whether one side is a decimal that rounds the irrational other: to half of its last digit and 1e-6 of it."""
    if (exact[0] is None) == (exact[1] is None) or not (first.is_real and second.is_real):
        return False
    value, decimal = (first, exact[1]) if exact[0] is None else (second, exact[0])
    assert decimal is not None
    if decimals[0 if exact[0] is not None else 1] is False:
        return False
    nearest = Fraction(str(value)).limit_denominator(10**6)
    if _close(value, sympy.Rational(nearest.numerator, nearest.denominator), _DIGITS):
        return False  # it is rational: the square root of 16, the cosine of 60 degrees
    places = _decimal_places(decimal.denominator)
    difference = abs(value - sympy.Rational(decimal.numerator, decimal.denominator))
    return places > 0 and bool(
        difference <= abs(value) / 10**6 and difference <= sympy.Rational(1, 2 * 10**places)
    )


def _decimal_places(denominator: int) -> int:
    """Digits behind the point of a fraction with this denominator; 0: an integer, or its digits do not end."""
    twos = fives = 0
    while denominator % 2 == 0:
        denominator, twos = denominator // 2, twos + 1
    while denominator % 5 == 0:
        denominator, fives = denominator // 5, fives + 1
    return max(twos, fives) if denominator == 1 else 0


@lru_cache(maxsize=1024)
def _math_verify_equal(left: Any, right: Any) -> bool:
    """math-verify's verdict in either direction, with as many digits as there are for its absolute tolerances."""
    for gold, target in ((left, right), (right, left)):
        try:
            if verify(
                gold,
                target,
                float_rounding=50,
                numeric_precision=50,
                timeout_seconds=None,
                raise_on_error=True,
            ):
                return True
        except MemoryError:
            raise
        except Exception:  # SymPy raises anything on odd input; math-verify counts that as unequal too
            continue
    return False
