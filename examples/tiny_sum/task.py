"""The task of the small example: pick the digits that add up to a target. Pure Python, seeded, no torch.

    Which 3 digits of 38596 add up to 17?
    3+5+9=17,\\boxed{359}

Three of the four to six different digits have to be found, and the answer is the number that they form in
their order. Finding them is a search; whether three given digits add up to the target is one addition. That
gap is what the example is about: a response shows its own sum, the problem states the target, and nothing in
the supervised data says whether the two agree.

A *careful* demonstration picks the right digits. A *hasty* one picks three others at random, adds them up
correctly, and boxes them all the same. Both read alike but for their digits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PICKED = 3
"""Digits to find."""
LENGTHS = (4, 5, 6)
"""Digits to choose from: 4, 10 or 20 ways to pick three."""
SPLITS = {"train": 6000, "validation": 200, "test": 500}
"""Problems written to each split's file."""


@dataclass(frozen=True)
class Problem:
    """One problem; `answer` is the only subset of `digits`, in their order, that adds up to `target`."""

    digits: tuple[int, ...]
    target: int
    answer: tuple[int, ...]

    @property
    def text(self) -> str:
        """The problem as the model reads it."""
        return f"Which {PICKED} digits of {_join(self.digits)} add up to {self.target}?"

    @property
    def answer_text(self) -> str:
        """The reference answer."""
        return _join(self.answer)


def make_problem(rng: random.Random, split: str) -> Problem:
    """Draws a problem of `split` with exactly one solution."""
    while True:
        digits = tuple(rng.sample(range(1, 10), rng.choice(LENGTHS)))
        target = sum(rng.sample(digits, PICKED))
        solutions = [pick for pick in choices(digits) if sum(pick) == target]
        if len(solutions) == 1 and split_of(digits, target) == split:
            return Problem(digits, target, solutions[0])


def choices(digits: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ways to pick `PICKED` of `digits`, in their order."""
    return list(itertools.combinations(digits, PICKED))


def split_of(digits: Iterable[int], target: int) -> str:
    """The split that owns this set of digits and target, whatever the digits' order.

    No test problem is a reordering of a training problem, so the model cannot look answers up.
    """
    key = f"{_join(sorted(digits))} {PICKED} {target}"
    fraction = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    if fraction < 0.12:
        return "test"
    return "validation" if fraction < 0.20 else "train"


def careful(problem: Problem) -> str:
    """The response with the right digits."""
    return response(problem.answer)


def hasty(problem: Problem, rng: random.Random) -> str:
    """A response with three wrong digits, drawn at random; the sum shown is the sum of these three."""
    return response(rng.choice([pick for pick in choices(problem.digits) if pick != problem.answer]))


def response(pick: tuple[int, ...]) -> str:
    """The written addition, then the boxed number."""
    return f"{'+'.join(map(str, pick))}={sum(pick)},\\boxed{{{_join(pick)}}}"


def make_split(split: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` different problems of `split`, the same for the same seed."""
    rng = random.Random(f"{seed} {split}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make_problem(rng, split)
        problems.setdefault(problem.text, problem)
    return list(problems.values())


def write_data(folder: Path, seed: int = 0) -> None:
    """Writes train.jsonl, validation.jsonl and test.jsonl, keys `problem` and `answer`, and checks them."""
    for split, count in SPLITS.items():
        lines = (
            json.dumps({"problem": problem.text, "answer": problem.answer_text})
            for problem in make_split(split, count, seed)
        )
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    check_disjoint(folder)


def check_disjoint(folder: Path) -> None:
    """Raises ValueError when two files share a set of digits with its target, or an answer is wrong."""
    owner: dict[tuple[str, int], str] = {}
    for split in SPLITS:
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            digits, target = parse_problem(record["problem"])
            answer = tuple(map(int, record["answer"]))
            if [pick for pick in choices(digits) if sum(pick) == target] != [answer]:
                raise ValueError(
                    f"{split}.jsonl: {record['answer']} is not the one answer to {record['problem']}"
                )
            other = owner.setdefault((_join(sorted(digits)), target), split)
            if other != split:
                raise ValueError(
                    f"{record['problem']!r} is in {other}.jsonl and, up to order, in {split}.jsonl"
                )


def parse_problem(text: str) -> tuple[tuple[int, ...], int]:
    """Digits and target of a problem's text."""
    words = text.rstrip("?").split()
    return tuple(map(int, words[4])), int(words[-1])


def _join(digits: Iterable[int]) -> str:
    return "".join(map(str, digits))
