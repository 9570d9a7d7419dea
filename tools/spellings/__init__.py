r"""Pairs of answers that are the same value in another spelling, and pairs that only look alike. Seeded.

Values are exact integers and Fractions, and every spelling is written here; nothing of the grader is used. Each form
is a way of writing that a model or a data set uses: `pairs(form, seed, count)` yields what must be right and what must
be wrong about it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import numbers, relations, signs
from .writing import Spelt


@dataclass(frozen=True, slots=True)
class Pair:
    """An answer, the reference that it is held against, and whether they are the same."""

    form: str
    answer: str
    gold: str
    same: bool


Form = tuple[Callable[[random.Random], Spelt], Callable[[random.Random], Spelt]]

# name -> its spellings of equal values, and its near misses
FORMS: dict[str, Form] = {
    "small numbers": (numbers.small_same, numbers.small_other),
    "number bases": (numbers.base_same, numbers.base_other),
    "equations with a value": (relations.chain_same, relations.chain_other),
    "homogeneous equations": (relations.plane_same, relations.plane_other),
    "points and lists": (relations.order_same, relations.order_other),
    "inequalities and intervals": (relations.interval_same, relations.interval_other),
    "the empty set": (relations.empty_same, relations.empty_other),
    "repeating decimals": (numbers.repeating_same, numbers.repeating_other),
    "groups of digits": (numbers.groups_same, numbers.groups_other),
    "powers of ten with e": (numbers.exponent_same, numbers.exponent_other),
    "dashes for minus": (signs.dash_same, signs.dash_other),
    "degrees": (signs.degrees_same, signs.degrees_other),
    "Unicode fractions and roots": (signs.unicode_same, signs.unicode_other),
    "a trailing dot": (signs.dot_same, signs.dot_other),
    "units": (signs.unit_same, signs.unit_other),
    "words": (signs.word_same, signs.word_other),
}


def pairs(form: str, seed: int, count: int) -> list[Pair]:
    """`count` different respelt pairs and as many near misses of one form."""
    found: list[Pair] = []
    for same, spell in zip((True, False), FORMS[form], strict=True):
        rng = random.Random(f"{form} {same} {seed}")
        different = dict.fromkeys(pair for pair, _ in zip(spell(rng), range(20 * count)))
        found += [Pair(form, answer, gold, same) for answer, gold in list(different)[:count]]
    return found


def table(seed: int = 0, total: int = 200) -> list[Pair]:
    """`total` respelt pairs and `total` near misses, spread over all forms."""
    names = list(FORMS)
    shares = [total // len(names) + (place < total % len(names)) for place in range(len(names))]
    return [pair for name, share in zip(names, shares) for pair in pairs(name, seed, share)]
