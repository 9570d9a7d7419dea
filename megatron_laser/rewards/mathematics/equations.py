r"""Equations and inequalities: which of them stand for a value or a set of reals, and which for themselves.

- `x = 5`, `f(2) = 5`, `m + n = 5`, `2 + 3 = 5` are 5; `6 = 5` is nothing; `m + n = 0` and `x + y = 5` are no values.
- An equation is solved for z, else y, else its only variable where it is linear in it: `2x - y + 3 = 0` and
  `y = 2x + 3` are the same as `2x + 3`, and `2x = 10` is 5. Other equations stand for themselves.
- `x >= 2` is the set of its solutions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.functions.elementary.trigonometric import TrigonometricFunction

from megatron_laser.rewards.mathematics.answer_types import (
    Equation,
    Inequality,
    Letters,
    ParsedAnswer,
    Piece,
    Statement,
    Unparsed,
    Value,
)
from megatron_laser.rewards.mathematics.expression_equality import exact_value, expressions_equal
from megatron_laser.rewards.mathematics.expression_parser import bits, is_constant, is_infinite
from megatron_laser.rewards.mathematics.intervals import (
    WHOLE,
    NotComparedError,
    complement,
    intersection,
    parsed_set,
    pieces_of,
)
from megatron_laser.rewards.mathematics.latex_tokens import bracketed, split, split_relations

_SUBSCRIPT = r"(?:_(?:\{[^{}]*\}|\\text\{[^{}]*\}|[a-zA-Z0-9]))?"
_NAME = re.compile(
    rf"(?:\\[a-zA-Z]+|[a-zA-Z]'*){_SUBSCRIPT}'*"  # x, x_1, \theta
    r"|\\text\{[^{}]*\}(?:_(?:\{[^{}]*\}|\w))?(?:\s*\([^()]*\))?"  # \text{Area}
    r"|[a-zA-Z]+'*(?:\^\{-1\})?(?:_\{?\w\}?)?\s*\([^()]*(?:\([^()]*\)[^()]*)*\)"  # f(2), P(X = 1)
    r"|(?:m\s*)?\\(?:angle|overline|vec|hat|bar|overrightarrow|widehat|triangle)\s*\{?[a-zA-Z ]{1,5}\}?"
    r"|\\frac\{d[a-zA-Z]?\}\{d[a-zA-Z]\}"
    r"|[A-Z]{2,4}|\|[A-Z]{2}\||\[[A-Z]{3,6}\]"  # AB, |AB|, [ABC]
)
_NO_NAMES = frozenset(["e", "i", "\\pi", "\\infty", "\\emptyset"])
_VARIABLE = re.compile(rf"\\?[a-zA-Z]+{_SUBSCRIPT}'*")
_PLANE = ("x", "y", "z")
_FUNCTIONS = ("f", "g", "h", "p", "q", "u", "v")
_CALL = re.compile(r"([a-zA-Z]+)[^()\\]*\((.*)\)")
_ARGUMENT = re.compile(r"[a-zA-Z]|-?\d+(?:\.\d+)?")
_SOLVABLE_BITS = 3000  # larger equations (high powers) are not expanded
_SOLVABLE_TERMS = 3000  # nor those of more terms

ParsePart = Callable[[str], ParsedAnswer]


def name_of(text: str) -> str | None:
    """The text, if it only names a quantity."""
    named = _NAME.fullmatch(text) and text not in _NO_NAMES and not _is_product(text)
    # sine and its like begin with a backslash too, but have no subscript or end
    return (
        text
        if named and not re.match(r"\\(?:sin|cos|tan|log|ln|frac(?!\{d)|sqrt)(?![a-zA-Z])", text)
        else None
    )


def _is_product(text: str) -> bool:
    """n(n + 1) and a(b + 1), which look like calls."""
    call = _CALL.fullmatch(text)
    if call is None or call[1] in _FUNCTIONS[:2]:
        return False
    of_itself = set(call[1]) & set(re.findall("[a-zA-Z]", call[2]))
    is_factor = len(call[1]) == 1 and call[1].islower() and call[1] not in _FUNCTIONS
    return bool(of_itself) or (is_factor and not _ARGUMENT.fullmatch(call[2].strip()))


def assigned_name(text: str) -> str | None:
    """The name of an assignment `name = ...`; None for anything else."""
    sides, relations = split_relations(text)
    return name_of(sides[0]) if relations and set(relations) == {"="} else None


def unknown_of(text: str) -> str | None:
    """The one variable of an inequality such as `1 < x`; None for anything else."""
    sides, relations = split_relations(text)
    names = [side for side in sides if _VARIABLE.fullmatch(side) and side not in _NO_NAMES]
    ordering = relations and set(relations) <= {"<", "<=", ">", ">=", "!="}
    return names[0] if ordering and len(names) == 1 else None


def parse_relation(text: str, parse: ParsePart) -> ParsedAnswer:
    """The answer in a text with relations outside brackets; `parse` parses its sides."""
    sides, relations = split_relations(text)
    kinds = set(relations)
    if "?" in kinds or any(not side for side in sides):
        return Unparsed(text)
    if "~" in kinds:  # the exact value is in front, unless that is a name
        kept = [side for side in sides if not name_of(side)]
        return parse(kept[0]) if kept and kinds <= {"=", "~"} else Unparsed(text)
    if kinds == {"in"}:
        return (
            parse(sides[1])
            if len(sides) == 2 and (name_of(sides[0]) or bracketed(sides[0]))
            else Unparsed(text)
        )
    if kinds == {"="}:
        return _parse_equation(text, sides, parse)
    if kinds <= {"<", "<=", ">", ">=", "!="}:
        return _parse_inequalities(text, sides, relations, parse)
    return Unparsed(text)


def _parse_equation(text: str, sides: list[str], parse: ParsePart) -> ParsedAnswer:
    names = [name_of(side) for side in sides]
    if names[-1] and not names[0]:
        sides, names = sides[::-1], names[::-1]
    if names[0]:
        value = _same_values(
            [side for side, name in zip(sides[1:], names[1:]) if not name] or sides[-1:], text, parse
        )
        return _solved_name(sides[0], value)
    point = bracketed(sides[0])
    if point and point[0] == "(" and len(sides) == 2:
        inner = split(point[1], ",")
        if len(inner) > 1 and all(name_of(part) for part in inner):
            return parse(sides[1]) if inner == sorted(inner) else Unparsed(text)
    values = [parse(side) for side in sides]
    if not all(isinstance(value, Value) for value in values):
        return Unparsed(text)
    expressions: list[Any] = [value.expression for value in values if isinstance(value, Value)]
    constants = [expression for expression in expressions if is_constant(expression)]
    if len(constants) == len(expressions):
        return _agreeing(constants, text)
    if len(constants) > 1:
        agreed = _agreeing(constants, text)
        if not isinstance(agreed, Value):
            return agreed
    left, right = expressions[0], expressions[-1]
    if is_constant(left):
        left, right = right, left
    if is_constant(right) and _is_quantity(left) and expressions_equal(right, sympy.S.Zero) is False:
        return Value(right)
    if expressions_equal(left, right):
        return Value(right)
    return _solved(left - right)


def _same_values(sides: list[str], text: str, parse: ParsePart) -> ParsedAnswer:
    """The value of a chain behind its name: the last one; constants have to be equal."""
    values = [parse(side) for side in sides]
    constants = [
        value.expression for value in values if isinstance(value, Value) and is_constant(value.expression)
    ]
    agreed = _agreeing(constants, text) if len(constants) > 1 else None
    return values[-1] if agreed is None or isinstance(agreed, Value) else agreed


def _agreeing(constants: list[Any], text: str) -> ParsedAnswer:
    verdicts = [expressions_equal(constant, constants[-1]) for constant in constants[:-1]]
    if any(verdict is False for verdict in verdicts):
        return Statement(text)
    return Value(constants[-1]) if all(verdicts) else Unparsed(text)


def _solved_name(name: str, value: ParsedAnswer) -> ParsedAnswer:
    """`y = 2x` is solved like any equation of the plane; other names only name their value."""
    if not isinstance(value, Value) or name not in _PLANE:
        return value
    in_plane = any(str(symbol) in _PLANE for symbol in value.expression.free_symbols)
    return _solved(sympy.Symbol(name, real=True) - value.expression) if in_plane else value


def _is_quantity(left: Any) -> bool:
    """Whether `left = constant` tells that constant, as m + n = 25 does, and is no line or curve, as x + y = 5."""
    names = {str(symbol) for symbol in left.free_symbols}
    if len(names) == 1:  # f(n), \cos\theta, \sin A; 2^x = 8 and |x| = 5 are to be solved
        (name,) = names
        of_angle = isinstance(left, TrigonometricFunction) and (len(name) > 1 or name.isupper())
        return of_angle or isinstance(left, AppliedUndef)
    return not names & set(_PLANE)


def _expanded_terms(value: Any) -> float:
    """An upper bound of the terms when products, powers and common denominators are multiplied out."""
    if not value.args:
        return 1.0
    inner = [_expanded_terms(argument) for argument in value.args]
    if isinstance(value, sympy.Pow) and isinstance(value.exp, sympy.Integer):
        count, power = inner[0], min(abs(int(value.exp)), 10**6)
        return math.exp(math.lgamma(count + power) - math.lgamma(power + 1) - math.lgamma(count))
    if isinstance(value, sympy.Mul):
        return math.prod(inner)
    if not isinstance(value, sympy.Add):
        return max(inner)
    below = [_expanded_terms(sympy.fraction(term)[1]) for term in value.args]
    return sum(inner) * math.prod(below)


def _solved(zero: Any) -> ParsedAnswer:
    """`zero = 0`, solved for the last of z and y or for the only variable, where it is linear in it."""
    if bits(zero) > _SOLVABLE_BITS or _expanded_terms(zero) > _SOLVABLE_TERMS:
        return Equation(zero)
    names = {str(symbol): symbol for symbol in zero.free_symbols}
    chosen = next((names[name] for name in ("z", "y") if name in names), None)
    if chosen is None and len(names) == 1:
        chosen = next(iter(names.values()))
    numerator = sympy.fraction(sympy.together(zero.doit()))[0]
    if chosen is None or not numerator.is_polynomial(chosen):
        return Equation(numerator)
    polynomial = sympy.Poly(numerator, chosen)
    if polynomial.degree() != 1:
        return Equation(numerator)
    slope, constant = polynomial.all_coeffs()
    if slope.free_symbols and sympy.gcd(slope, constant).free_symbols:  # xy = 0, x(y - 1) = 0
        return Equation(numerator)
    return Value(-constant / slope)


def _parse_inequalities(text: str, sides: list[str], relations: list[str], parse: ParsePart) -> ParsedAnswer:
    parsed_parts = [parse(side) for side in sides]
    values = [
        parsed.product if isinstance(parsed, Letters) else parsed.expression
        for parsed in parsed_parts
        if isinstance(parsed, (Letters, Value))
    ]
    if len(values) < len(sides):
        return Unparsed(text)
    if all(is_constant(value) for value in values):
        return Statement(text)
    variables = {symbol for value in values for symbol in value.free_symbols}
    parsed_parts = [_parse_inequality(*pair) for pair in zip(values, relations, values[1:], strict=False)]
    if len(parsed_parts) == 1:
        return parsed_parts[0]
    pieces = [pieces_of(parsed) for parsed in parsed_parts]
    if len(variables) != 1 or any(piece is None for piece in pieces):
        return Unparsed(text)
    try:
        common = pieces[0] or []
        for piece in pieces[1:]:
            common = intersection(common, piece or [])
        return parsed_set(common)
    except NotComparedError:
        return Unparsed(text)


def _parse_inequality(left: Any, relation: str, right: Any) -> ParsedAnswer:
    if is_infinite(left) or is_infinite(right):  # -oo < x
        return parsed_set([WHOLE])
    positive = left - right if relation.startswith(">") else right - left
    symbols = positive.free_symbols
    strict = not relation.endswith("=") or relation == "!="
    if len(symbols) != 1 or bits(positive) > _SOLVABLE_BITS or not positive.is_polynomial(*symbols):
        return Inequality(positive, strict) if relation != "!=" else Unparsed(f"{positive} != 0")
    polynomial = sympy.Poly(positive, *symbols)
    if polynomial.degree() != 1:
        return Inequality(positive, strict) if relation != "!=" else Unparsed(f"{positive} != 0")
    slope, constant = polynomial.all_coeffs()
    bound = -constant / slope
    if (value := exact_value(bound)) is not None:
        bound = sympy.Rational(value.numerator, value.denominator)
    if relation == "!=":
        return parsed_set(complement([Piece(bound, True, bound, True)]))
    above = bool(slope.evalf() > 0)
    piece = Piece(bound, not strict, sympy.oo, False) if above else Piece(-sympy.oo, False, bound, not strict)
    return parsed_set([piece])
