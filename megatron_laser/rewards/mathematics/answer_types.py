"""What an answer can be: a value, words, a list, a point, a set of reals, a matrix, an equation. No parsing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Value:
    """A number or an expression (SymPy), and the unit behind it, with a ? in front where that is not known."""

    expression: Any
    unit: str | None = None
    is_decimal: bool | None = field(default=None, compare=False)  # written as one; None: not known


@dataclass(frozen=True, slots=True)
class Numeral:
    """Digits in a base other than ten: another base is another answer, and so is the value in base ten."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Letters:
    """Two capitals, or those of an angle: a name, a Roman numeral, or the product of their values (SymPy)."""

    text: str
    product: Any


@dataclass(frozen=True, slots=True)
class Clock:
    """3:30: a time, or the ratio of 3 to 30; `half` is am, pm or empty."""

    hour: int
    minute: int
    half: str


@dataclass(frozen=True, slots=True)
class Words:
    """A text, in lower case."""

    text: str


@dataclass(frozen=True, slots=True)
class Point:
    """Items in an order: (1, 2). The open interval from 1 to 2 is written, and compared, in the same way."""

    items: tuple[ParsedAnswer, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """Items in no order: {1, 2}, and 1, 2 without brackets; the empty set."""

    items: tuple[ParsedAnswer, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval of the reals by its ends (constants, SymPy); a point where they are one."""

    low: Any
    low_closed: bool
    high: Any
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Reals:
    """A union of disjoint intervals in ascending order, other than one open interval (see Point)."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A matrix by its rows."""

    rows: tuple[tuple[ParsedAnswer, ...], ...]


@dataclass(frozen=True, slots=True)
class Equation:
    """zero = 0, where that gives no value of one variable."""

    zero: Any


@dataclass(frozen=True, slots=True)
class Inequality:
    """positive > 0, or >= 0, in more than one variable or not linear."""

    positive: Any
    strict: bool


@dataclass(frozen=True, slots=True)
class Statement:
    """A claim about constants: 6 = 5. It is the value of nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class Unparsed:
    """What could not be read; equal to its own spelling and otherwise undecided."""

    text: str


ParsedAnswer = (
    Value
    | Numeral
    | Letters
    | Clock
    | Words
    | Point
    | Items
    | Reals
    | Table
    | Equation
    | Inequality
    | Statement
    | Unparsed
)
