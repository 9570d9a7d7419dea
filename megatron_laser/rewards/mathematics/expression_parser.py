r"""Parsing one expression with math-verify's LaTeX parser, and how large its values can get. Imports SymPy."""

from __future__ import annotations

import math
import re
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended import normalize_latex as library_normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.core.function import AppliedUndef

# units=False: math-verify's list of units holds t, h, c, l and s, so that 2t would be 2
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
)
_CONVERSION = ConversionConfig(interpret_contains_as_eq=False, lowercase_symbols=False)  # R is not r
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DECIMAL_LOGARITHM = re.compile(r"\\lg(?![a-zA-Z])")
_PRIMES = re.compile(r"([a-zA-Z])('+)")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
# the parser takes 3(\frac{1}{2}) for 3\frac{1}{2}, and the \pi of 2\frac{1}{2}\pi for a factor of the fraction alone
_BEFORE_BRACKET = re.compile(r"((?<![\d.^_])(?:\d+(?:\.\d+)?|\.\d+)|\))\s*(?=\()")
_FACTOR = re.compile(r"(\\frac\{[^{}]*\}\{[^{}]*\}|(?<![\^_a-zA-Z}\]])\{\s*\d+\s*\})\s*(?=\()")
_MIXED = re.compile(r"(?<![\d.^_}])(\d+)\s*(\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})")
_CAPITAL_I = re.compile(r"(?<![\\a-zA-Z_])(?<!_\{)((?:[a-zA-Z]*I)+[a-zA-Z]*)")
TAME_BITS = 1_000_000  # logarithm of the largest intermediate value that is evaluated numerically
_MAX_TERMS = 10_000  # of a sum that is added up


def parse_expression(text: str) -> Any:
    """The SymPy object of an expression in normalised LaTeX; None where there is none."""
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"(\\frac{\1 \\cdot \\pi}{180})", text)
    text = _MIXED.sub(r"(\1+\2)", _BEFORE_BRACKET.sub(r"\1 \\cdot ", _FACTOR.sub(r"\1 \\cdot ", text)))
    text = _CAPITAL_I.sub(lambda letters: letters[1].replace("I", r" \iota_{cap} "), text)  # it is not i
    text = _DECIMAL.sub(_exact_decimal, _DECIMAL_LOGARITHM.sub(r"\\log_{10}", text))
    text = _PRIMES.sub(lambda name: f"{name[1]}_{{{'p' * len(name[2])}}}", text)  # the parser drops them
    try:
        latex = library_normalize_latex(text, config=_NORMALIZATION)
        value = latex2sympy(latex, is_real=True, normalization_config=None, conversion_config=_CONVERSION)
    except MemoryError:
        raise
    except Exception:  # whatever the parser raises on what is no LaTeX
        return None
    return _settle(value)


def _exact_decimal(match: re.Match[str]) -> str:
    if len(match[2]) > 1000:
        return match.group()
    fraction = f"\\frac{{{(match[1] + match[2]).lstrip('0') or '0'}}}{{{10 ** len(match[2])}}}"
    return f"{{{fraction}}}" if match.string[: match.start()].rstrip().endswith(("^", "_")) else fraction


def _settle(value: Any) -> Any:
    """i is the imaginary unit; matrices are computed; None for infinities of no direction and for sets."""
    if isinstance(value, (sympy.MatrixBase, sympy.MatrixExpr)):
        return value
    # a derivative of a function that is not known is no 0
    if not isinstance(value, sympy.Expr) or value.has(sympy.nan, sympy.zoo, sympy.Derivative):
        return None
    if bits(value) >= TAME_BITS:
        return value
    # unevaluated, SymPy takes log(3, 2) for the logarithm of 3
    bases = {
        term: sympy.log(term.args[0]) / sympy.log(term.args[1])
        for term in value.atoms(sympy.log)
        if len(term.args) == 2
    }
    value = value.xreplace(bases)
    imaginary = [symbol for symbol in value.free_symbols if str(symbol) == "i"]
    return value.xreplace({symbol: sympy.I for symbol in imaginary})


def is_constant(value: Any) -> bool:
    """Whether no variable is in it."""
    return not value.free_symbols and not value.has(AppliedUndef)


def is_infinite(value: Any) -> bool:
    """Whether it is plus or minus infinity; SymPy's own attribute would compute huge powers to find out."""
    return value in (sympy.oo, -sympy.oo)


def bits(value: Any) -> float:
    """An upper bound of |log2 |x|| over all intermediate values of an expression; variables count as small."""
    if isinstance(value, sympy.Integer):
        return float(abs(value.p).bit_length())
    if isinstance(value, sympy.Rational):
        return float(abs(value.p).bit_length() + value.q.bit_length())
    if not value.args:
        return 3.0
    inner = [bits(argument) for argument in value.args]
    if isinstance(value, sympy.Pow):
        exponent = value.exp
        if isinstance(exponent, sympy.Integer):
            return inner[0] * max(1, abs(exponent.p)) if abs(exponent.p).bit_length() < 60 else math.inf
        if inner[1] < 1000 and is_constant(exponent):
            power = abs(complex(exponent.evalf(15)))
            return inner[0] * max(1.0, power) if power < 1e12 else math.inf
        return math.inf if inner[1] > 30 else max(inner) * 2.0 ** inner[1]
    if isinstance(value, (sympy.factorial, sympy.gamma, sympy.exp, sympy.binomial)):
        return math.inf if inner[0] > 30 else 2.0 ** inner[0] * max(inner[0], 1.5)
    if isinstance(value, (sympy.Sum, sympy.Product)):
        term = 5 * sum(inner) + 20  # an index has up to 14 bits where a variable counts as 3
        terms = _terms(value) if isinstance(value, sympy.Product) else 1.0
        return term * terms if _terms(value) <= _MAX_TERMS else math.inf
    return sum(inner) + len(inner)


def _terms(value: Any) -> float:
    """How many terms a sum or product adds up; 1 where it ends at infinity or at a variable."""
    count = 1.0
    for _, first, last in value.limits:
        if isinstance(first, sympy.Integer) and is_constant(last) and not is_infinite(last):
            count *= max(1.0, float((last - first).evalf(15)) + 1) if bits(last) <= 30 else math.inf
    return count
