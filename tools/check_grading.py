#!/usr/bin/env python
"""Grades reference answers against themselves and against each other: the figures of docs/measurements/grading.md.

    python tools/check_grading.py data/math500.jsonl data/aime24.jsonl
    python tools/check_grading.py data/*.jsonl --all-pairs --output docs/measurements/grading.md   # minutes

Five questions: is every answer right about itself, in the wrapping that the paper asks the model for; is it so by
math-verify alone, without the shortcut for equal strings; is any answer right about another problem (each against
seeded shuffles, or all pairs); how long do 1000 grades take; and how do hostile answers end.
Exit status 1 where an answer is wrong about itself, a shuffled one is right without a reason, or a hostile one does
not end.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path

from megatron_laser.data import read_rows
from megatron_laser.rewards import GradingPool, grade_math
from megatron_laser.rewards.boxed import gold_answer
from megatron_laser.rewards.math_grading import grade_extracted

WRAPPINGS = {
    "boxed": "So the answer is $\\boxed{%s}$.",
    "boxed, sentence before and box inside display math": "First \\boxed{wrong}, then\n\\[\\boxed{%s}\\]\n",
    "boxed with its own dollars": "\\boxed{$%s$}",
    "fbox": "\\fbox{%s}",
}
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
UNITS = re.compile(r"\\circ|\\\$|\\mbox|\\text|_\{?\d+\}?$|\\%|\\!|,")


def reason(left: str, right: str) -> str:
    """Why two different strings may be equal; "" where no reason is known."""
    plain = [re.sub(r"[\s{}]|\\[!,;]", "", text) for text in (left, right)]
    if plain[0] == plain[1]:
        return "spelling"
    if all("," in text and not re.search(r"\d,\d{3}\b", text) for text in (left, right)):
        return "a list without brackets is a set, whatever its order and the other's brackets"
    if "=" in left or "=" in right:
        return "an assignment stands for its right side"
    if UNITS.search(left) or UNITS.search(right):
        return "units, bases and thousands separators do not count"
    return ""


def self_grades(golds: Sequence[str]) -> tuple[list[str], bool]:
    """Lines of the report, and whether all are right."""
    lines, fine = [], True
    for name, wrapping in WRAPPINGS.items():
        wrong = [(gold, grade_math(wrapping % gold, gold).outcome) for gold in golds]
        wrong = [entry for entry in wrong if entry[1] != "correct"]
        fine &= not wrong
        lines.append(f"| {name} | {len(golds) - len(wrong)} of {len(golds)} |")
        lines += [f"| not right: `{gold}` | {outcome} |" for gold, outcome in wrong]
    alone = [
        gold for gold in sorted({gold_answer(g) for g in golds}) if grade_extracted(gold, gold).reward != 1.0
    ]
    distinct = len({gold_answer(gold) for gold in golds})
    lines.append(
        f"| by math-verify alone, no string shortcut | {distinct - len(alone)} of {distinct} distinct |"
    )
    lines += [f"| only by the string: `{gold}` | handled by the shortcut |" for gold in alone]
    return lines, fine


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
    own, own_fine = self_grades(golds)
    with GradingPool(workers=2, deadline=options.deadline) as pool:
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
    table = ["| answer | reference | why they are equal |", "|---|---|---|"]
    lines = [
        "# Grading: reference answers against themselves and each other",
        "",
        f"    python tools/check_grading.py {' '.join(file.name for file in options.files)}"
        + (" --all-pairs" if options.all_pairs else ""),
        "",
        f"- {len(golds)} answers of {', '.join(file.stem for file in options.files)}; {os.cpu_count()} CPU cores, "
        "shared with other jobs; two workers",
        f"- 1000 answers of 1 kB, half of them right, none settled by equal strings: {text}",
        "",
        "## Against themselves",
        "",
        "| wrapping | right |",
        "|---|---|",
        *own,
        "",
        f"## Against {options.shuffles} shuffles: {count} pairs of different answers, {len(shuffled)} right, "
        f"{unexplained} of them without a reason",
        "",
        *([*table, *shuffled, ""] if shuffled else []),
    ]
    if options.all_pairs:
        head = f"{every_count} ordered pairs of different answers, {len(every)} right"
        lines += [f"## All pairs: {head}, {every_unexplained} without a reason", "", *table, *every, ""]
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
    return 0 if own_fine and ends_fine and not unexplained and not every_unexplained else 1


if __name__ == "__main__":
    sys.exit(main())
