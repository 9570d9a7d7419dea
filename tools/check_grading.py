#!/usr/bin/env python
"""Measures the grader: false right, false wrong and undecided. The figures of docs/measurements/grading.md.

    python tools/check_grading.py data/math500.jsonl data/aime24.jsonl
    python tools/check_grading.py data/*.jsonl --all-pairs --output docs/measurements/grading.md   # minutes

Five questions: are pairs whose sameness is known graded so, form by form (tools/spellings, seeded), and do votes agree;
is each reference right when a model writes it, respelt and in a sentence; is any answer right about another problem
(seeded shuffles, or all pairs); how long do 1000 grades take; and how do hostile answers end.
Exit status 1 where a pair of different values is right, more than 2 % of the same values are wrong, grades and
votes disagree, a reference has no spelling that is right, or a hostile answer does not end.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from itertools import permutations
from pathlib import Path

from spellings import Pair, table
from spellings.respell import as_a_model, respellings

from megatron_laser.data import read_rows
from megatron_laser.rewards import GradingPool, equivalence_classes
from megatron_laser.rewards.mathematics.boxed import gold_answer

HOSTILE = {
    "10^6 nested braces": "\\boxed{" + "{" * 10**6 + "5" + "}" * 10**6 + "}",
    "1900 nested braces (short enough to be parsed)": "\\boxed{" + "{" * 900 + "5" + "}" * 900 + "}",
    "9^9^9^9": "\\boxed{9^{9^{9^9}}}",
    "factorial of a factorial": "\\boxed{((999!)!)!}",
    "unbalanced LaTeX": "\\boxed{\\frac{1}{\\sqrt{",
    "unbalanced inside the box": "\\boxed{\\left(\\frac{1}{2}\\right]]}",
    "100 kB of text": "word " * 20_000,
    "100 kB in the box": "\\boxed{" + "x+" * 50_000 + "1}",
    "control characters": "\\boxed{\x00\x1b[31m\x7f}",
    "a lone surrogate": "\\boxed{\ud800}",
    "1900 dollars": "\\boxed{" + "$" * 1900 + "}",
    "a million boxes": "\\boxed{1}" * 10**6,
}
UNITS = re.compile(r"\\circ|\\\$|\\mbox|\\text|\\%|\\!|\{,\}|\d,\d{3}\b")


def reason(left: str, right: str) -> str:
    """Why two different strings may be equal; "" where no reason is known."""
    plain = [re.sub(r"[\s{}]|\\[!,;]", "", text) for text in (left, right)]
    if plain[0] == plain[1]:
        return "spelling"
    if all(
        "," in text and text[0] not in "([" and not re.search(r"\d,\d{3}\b", text) for text in (left, right)
    ):
        return "a list of solutions has no order"
    if "=" in left or "=" in right:
        return "an assignment stands for its right side"
    if UNITS.search(left) or UNITS.search(right):
        return "units and thousands separators do not count"
    return ""


class Count:
    """Grades of pairs whose sameness is known."""

    def __init__(self) -> None:
        self.same = self.other = self.false_wrong = self.false_right = self.undecided = 0
        self.names: list[str] = []

    def add(self, answer: str, gold: str, same: bool, outcome: str) -> None:
        """Count one grade; what is neither right nor wrong is undecided."""
        self.same += same
        self.other += not same
        if outcome not in ("correct", "wrong"):
            self.undecided += 1
        elif (outcome == "correct") != same:
            self.false_wrong += same
            self.false_right += not same
        else:
            return
        self.names.append(f"`{answer}` for `{gold}`: {outcome}")

    def row(self, name: str) -> str:
        """A row of the table below `HEAD`."""
        figures = (self.same, self.false_wrong, self.other, self.false_right, self.undecided)
        return f"| {name} | {' | '.join(map(str, figures))} |"


NAMED = 4  # of each form
HEAD = [
    "| form | same | of them wrong | different | of them right | undecided |",
    "|---|---|---|---|---|---|",
]


def spelt_grades(pool: GradingPool, pairs: Sequence[Pair]) -> tuple[dict[str, Count], list[str]]:
    """Counts by form, both ways round, and the pairs where grades and votes disagree."""
    counts: dict[str, Count] = {}
    split: list[str] = []
    both = [(pair, *side) for pair in pairs for side in ((pair.answer, pair.gold), (pair.gold, pair.answer))]
    grades = pool.grade_many([(f"\\boxed{{{answer}}}", gold) for _, answer, gold in both])
    for (pair, answer, gold), grade in zip(both, grades, strict=True):
        counts.setdefault(pair.form, Count()).add(answer, gold, pair.same, grade.outcome)
        first, second = equivalence_classes([answer, gold], pool=pool)
        in_time = grade.outcome not in ("timeout", "crash")  # a busy machine's are no verdict
        if in_time and (first == second) != (grade.outcome == "correct"):
            split.append(f"`{answer}`, `{gold}`: graded {grade.outcome}")
    return counts, split


def respelt_grades(pool: GradingPool, golds: Sequence[str]) -> tuple[dict[str, Count], list[str]]:
    """Counts by respelling of every reference as a model would write it, and references that none of them equals."""
    counts: dict[str, Count] = {}
    items = [
        (name, text, gold, as_a_model(text, number))
        for number, gold in enumerate(dict.fromkeys(golds))
        for name, text in respellings(gold_answer(gold)).items()
    ]
    grades = pool.grade_many([(response, gold) for _, _, gold, response in items])
    right = {gold: 0 for _, _, gold, _ in items}
    for (name, text, gold, _), grade in zip(items, grades, strict=True):
        counts.setdefault(name, Count()).add(text, gold, True, grade.outcome)
        right[gold] += grade.outcome == "correct"
    return counts, [gold for gold, times in right.items() if times == 0]


def table_of(counts: dict[str, Count]) -> list[str]:
    """The rows, their sum, and the first pairs of each that are not what they should be."""
    total = Count()
    for count in counts.values():
        for name in ("same", "other", "false_wrong", "false_right", "undecided"):
            setattr(total, name, getattr(total, name) + getattr(count, name))
    lines = [*HEAD, *(count.row(name) for name, count in counts.items()), total.row("**all**"), ""]
    return lines + [f"- {line}" for count in counts.values() for line in count.names[:NAMED]] + [""]


def limits_kept(counts: Iterable[Count]) -> bool:
    """No false right, and at most 2 % false wrong."""
    counts = list(counts)
    return not sum(count.false_right for count in counts) and sum(
        count.false_wrong for count in counts
    ) <= 0.02 * sum(count.same for count in counts)


def shuffled_pairs(golds: Sequence[str], shuffles: int) -> list[tuple[str, str]]:
    """(response, gold) of other problems whose answers are other strings, from seeded derangements."""
    pairs = []
    for seed in range(shuffles):
        order = list(range(len(golds)))
        random.Random(seed).shuffle(order)
        pairs += [(f"\\boxed{{{golds[i]}}}", golds[j]) for i, j in zip(order, order[1:] + order[:1])]
    return [(a, b) for a, b in pairs if gold_answer(a) != gold_answer(b)]


def false_rights(pool: GradingPool, pairs: Iterable[tuple[str, str]]) -> tuple[list[str], int, int]:
    """Lines that name each different pair that is right, how many of them have no reason, and the pairs graded."""
    pairs = list(pairs)
    found: dict[tuple[str, str], str] = {}
    for (response, gold), grade in zip(pairs, pool.grade_many(pairs), strict=True):
        if grade.outcome == "correct":
            answer = gold_answer(response)
            found[answer, gold_answer(gold)] = reason(answer, gold_answer(gold))
    lines = [f"| `{a}` | `{b}` | {why or '**none known**'} |" for (a, b), why in sorted(found.items())]
    return lines, sum(not why for why in found.values()), len(pairs)


def hostile(deadline: float) -> tuple[list[str], bool]:
    """How each ends, and whether the pool grades on."""
    lines, fine = [], True
    with GradingPool(workers=2, deadline=deadline) as pool:
        for name, response in HOSTILE.items():
            start = time.monotonic()
            grade = pool.grade_many([(response, "5")])[0]
            spent = time.monotonic() - start
            # a worker that had to be killed is replaced before the next request: seconds of their own
            fine &= spent < deadline + 10 and (grade.outcome != "correct" or "braces" in name)
            lines.append(f"| {name} | {grade.outcome} | {spent:.2f} s |")
        alive = pool.grade_many([("\\boxed{\\frac{3}{6}}", "0.5")])[0].outcome == "correct"
        fine &= alive
        lines.append(f"| afterwards: 3/6 against 0.5 | {'correct' if alive else 'NOT CORRECT'} | |")
    return lines, fine


def speed(golds: Sequence[str]) -> tuple[str, float]:
    """1000 answers, half of them right, none of them twice or settled by equal strings, on two workers."""
    rng = random.Random(0)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < 1000:
        gold, number = rng.choice(golds), len(pairs)
        other = gold if number % 2 else rng.choice(golds)
        pairs.append((f"{'text ' * 200}\\boxed{{ {other} + {number} - {number} }}", gold))
    with GradingPool(workers=2) as pool:
        start = time.monotonic()
        grades = pool.grade_many(pairs)
        spent = time.monotonic() - start
    counts = {
        name: sum(grade.outcome == name for grade in grades) for name in ("correct", "wrong", "unparsable")
    }
    return f"{spent:.1f} s ({', '.join(f'{value} {name}' for name, value in counts.items())})", spent


def main(values: Sequence[str] | None = None) -> int:
    """Run all checks, print the report, write it if wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help=".jsonl or .parquet with `problem` and `answer`")
    parser.add_argument("--seed", type=int, default=0, help="of the generated pairs")
    parser.add_argument("--shuffles", type=int, default=5, help="seeded shuffles of all answers")
    parser.add_argument(
        "--all-pairs", action="store_true", help="every answer against every other, both ways"
    )
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds for one answer")
    parser.add_argument("--output", type=Path, help="also write the report here")
    options = parser.parse_args(values)
    golds = [
        row.answer
        for file in options.files
        for row in read_rows(file, prompt_key="problem", answer_key="answer")
    ]
    with GradingPool(workers=2, deadline=options.deadline) as pool:
        spelt, split = spelt_grades(pool, table(options.seed))
        respelt, unreachable = respelt_grades(pool, golds)
        pairs = shuffled_pairs(golds, options.shuffles)
        shuffled, unexplained, count = false_rights(pool, pairs)
        every, every_unexplained, every_count = [], 0, 0
        if options.all_pairs:
            distinct = sorted({gold_answer(gold): gold for gold in golds}.values())
            every, every_unexplained, every_count = false_rights(
                pool, ((f"\\boxed{{{a}}}", b) for a, b in permutations(distinct, 2))
            )
    ends, ends_fine = hostile(options.deadline)
    text, _ = speed(golds)
    head = ["| answer | reference | why they are equal |", "|---|---|---|"]
    lines = [
        "# Grading: false right, false wrong, undecided",
        "",
        f"    python tools/check_grading.py {' '.join(file.name for file in options.files)}"
        + (" --all-pairs" if options.all_pairs else ""),
        "",
        f"- {date.today()}; Python {platform.python_version()}, math-verify {version('math-verify')}, "
        f"SymPy {version('sympy')}",
        f"- {len(golds)} answers of {', '.join(file.stem for file in options.files)}; {os.cpu_count()} CPU cores, "
        "shared with other jobs; two workers",
        f"- 1000 answers of 1 kB, half of them right, none settled by equal strings: {text}",
        "",
        f"## Generated pairs (seed {options.seed}), each both ways round",
        "",
        *table_of(spelt),
        f"Grade and vote disagree on {len(split)} pairs.",
        *(f"- {line}" for line in split),
        "",
        f"## {len(set(golds))} different references as a model writes them",
        "",
        *table_of(respelt),
        f"References that no spelling equals: {len(unreachable)}",
        *(f"- `{gold}`" for gold in unreachable),
        "",
        f"## Against {options.shuffles} shuffles: {count} pairs of different answers, {len(shuffled)} right, "
        f"{unexplained} of them without a reason",
        "",
        *([*head, *shuffled, ""] if shuffled else []),
    ]
    if options.all_pairs:
        title = f"{every_count} ordered pairs of different answers, {len(every)} right"
        lines += [f"## All pairs: {title}, {every_unexplained} without a reason", "", *head, *every, ""]
    lines += [
        f"## Hostile answers, deadline {options.deadline:g} s",
        "",
        "| answer | outcome | ended after |",
    ]
    lines += ["|---|---|---|", *ends, ""]
    report = "\n".join(lines)
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    wrong = [
        not limits_kept(spelt.values()),
        not limits_kept(respelt.values()),
        bool(split or unreachable or unexplained or every_unexplained),
        not ends_fine,
    ]
    return 1 if any(wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
