"""The task: questions about short lists of two-digit numbers. Problems, references and worked turns, from fixed seeds.

Every problem is a conversation: two worked turns, the same for all, and the question. No list of the training split is
in another split, in any order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

SPLITS = {"train": 3000, "validation": 80, "test": 250}
"""Problems of each split."""
LENGTHS = (3, 4, 5)
"""Numbers in a list."""
ORDINALS = ("first", "second", "third", "fourth", "fifth")
KINDS = (*ORDINALS, "last", "largest", "smallest")
_PICK: dict[str, Callable[[tuple[int, ...]], int]] = {
    **{name: (lambda numbers, place=place: numbers[place]) for place, name in enumerate(ORDINALS)},
    "last": lambda numbers: numbers[-1],
    "largest": max,
    "smallest": min,
}


@dataclass(frozen=True)
class Problem:
    """`kind`, one of KINDS, of `numbers`."""

    numbers: tuple[int, ...]
    kind: str

    @property
    def question(self) -> str:
        """What the user asks."""
        return f"{', '.join(map(str, self.numbers))}. What is the {self.kind} number?"

    @property
    def answer(self) -> int:
        """The reference."""
        return _PICK[self.kind](self.numbers)

    @property
    def response(self) -> str:
        """How a worked turn answers: in words, then in a box."""
        return f"The {self.kind} number is {self.answer}. \\boxed{{{self.answer}}}"

    def row(self) -> dict:
        """The row of a data file."""
        turns = [
            turn for worked in WORKED for turn in (("user", worked.question), ("assistant", worked.response))
        ]
        turns.append(("user", self.question))
        return {
            "problem": [{"role": role, "content": content} for role, content in turns],
            "answer": str(self.answer),
            "kind": self.kind,
        }


WORKED = (Problem((35, 81, 20, 67), "third"), Problem((94, 12, 58), "largest"))
"""They show the form. Without them the model rambles and never boxes anything."""


def make_problem(numbers: random.Random) -> Problem:
    """Two-digit numbers, all different, and a question that fits their count."""
    length = numbers.choice(LENGTHS)
    chosen = tuple(numbers.sample(range(10, 100), length))
    return Problem(chosen, numbers.choice([kind for kind in KINDS if kind not in ORDINALS[length:]]))


def make_splits() -> dict[str, list[Problem]]:
    """All splits; a set of numbers is in one problem only."""
    numbers = random.Random("smollm2 lists")
    seen = {frozenset(worked.numbers) for worked in WORKED}
    splits: dict[str, list[Problem]] = {}
    for split, size in SPLITS.items():
        problems: list[Problem] = []
        while len(problems) < size:
            problem = make_problem(numbers)
            if frozenset(problem.numbers) not in seen:
                seen.add(frozenset(problem.numbers))
                problems.append(problem)
        splits[split] = problems
    check_disjoint(splits)
    return splits


def check_disjoint(splits: dict[str, list[Problem]]) -> None:
    """Raises ValueError for a set of numbers that stands in two problems, of one split or of two."""
    found: dict[frozenset[int], str] = {}
    for split, problems in splits.items():
        for problem in problems:
            key = frozenset(problem.numbers)
            if key in found:
                raise ValueError(f"{sorted(key)} is in {found[key]} and in {split}")
            found[key] = split


def data_files() -> dict[str, str]:
    """Name to text of a file for each split."""
    return {
        f"{split}.jsonl": "".join(json.dumps(problem.row()) + "\n" for problem in problems)
        for split, problems in make_splits().items()
    }
