"""Grades of single answers; the quick decisions agree with math-verify itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from math_verify import LatexExtractionConfig, parse, verify

from megatron_laser.rewards import Grade, answers_equal, grade_math
from megatron_laser.rewards.mathematics.boxed import normalize_answer
from megatron_laser.rewards.mathematics.grading import quick_equal


def reference_equal(gold: str, target: str) -> bool:
    """math-verify on the raw answers, without any of our normalising."""
    gold_values, target_values = (
        parse(f"\\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
        for text in (gold, target)
    )
    return bool(verify(gold_values, target_values, timeout_seconds=None))


@pytest.mark.parametrize(
    ("response", "answer", "outcome"),
    [
        (r"\boxed{5}", "5", "correct"),
        (r"\boxed{5}", r"$\boxed{5}$", "correct"),
        (r"\boxed{0.5}", r"$\frac{1}{2}$", "correct"),
        (r"\boxed{x+1}", "1+x", "correct"),
        (r"\boxed{(3,\frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", "correct"),
        (r"\boxed{1,000}", "1000", "correct"),
        (r"\boxed{x=5}", "5", "correct"),
        (r"\boxed{\text{blue}}", r"\text{blue}", "correct"),
        (r"\boxed{m+n=25}", "25", "correct"),
        (r"\boxed{a+b=0}", "0", "wrong"),  # nor is one without a constant
        (r"\boxed{5x-7y+11z+4=0}", "0", "wrong"),  # an equation in standard form is not the answer 0
        (r"\boxed{0}", "5x - 7y + 11z + 4 = 0", "wrong"),
        (r"\boxed{11z - 7y + 5x + 4 = 0}", "5x - 7y + 11z + 4 = 0", "correct"),
        (r"\boxed{6}", "5", "wrong"),
        (r"\boxed{\frac{2}{3}}", "0.5", "wrong"),
        (r"first \boxed{5}, no: \boxed{6}", "5", "wrong"),
        ("the answer is 5", "5", "no_answer"),
        ("", "5", "no_answer"),
        (r"\boxed{\frac{1}{", "5", "unparsable"),
        (r"\boxed{\left(}", "5", "unparsable"),
        (r"\boxed{}", "5", "unparsable"),
        ("\\boxed{a\x00b\x07}", "5", "unparsable"),
        (r"\boxed{" + "1" * 100_000 + "}", "5", "unparsable"),
        ("x" * 100_000 + r"\boxed{5}", "5", "correct"),
    ],
)
def test_every_answer_gets_its_outcome(response: str, answer: str, outcome: str) -> None:
    assert grade_math(response, answer) == Grade(1.0 if outcome == "correct" else 0.0, outcome)  # type: ignore[arg-type]


ANSWERS = ["5", "-5", "+5", "05", "-0", "0", "6", "12345678901234567890123", "12345678901234567890124"]


def test_integers_compare_as_math_verify_does() -> None:
    for left in ANSWERS:
        for right in ANSWERS:
            quick = quick_equal(left, right)
            assert quick is reference_equal(left, right), (left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\left(1,2\right)", "(1,2)"),
        (r"$\sqrt{2}$", r"\sqrt{2}"),
        (r"\(x^2\)", "x^2"),
        (r"10\!0", "100"),
        (r"\text{yes}", r" \text{yes}"),
        (r"\left|x\right|", "|x|"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1  \\  2 \end{pmatrix}"),
    ],
)
def test_what_normalising_makes_identical_is_equal_to_math_verify(left: str, right: str) -> None:
    assert quick_equal(normalize_answer(left), normalize_answer(right)) is True
    assert reference_equal(left, right)


def test_spelling_and_plain_numbers_settle_nothing_else() -> None:
    assert quick_equal("5", "5.0") is True
    assert quick_equal(r"\frac{1}{3}", "0.333") is False
    assert quick_equal("x", "y") is None
    assert quick_equal("1_000", "1000") is None  # int() would take the underscore
    assert quick_equal("٣", "3") is None  # ... and other scripts' digits


def test_equality_is_symmetric_where_math_verify_is_not() -> None:
    pairs = [("x=5", "5"), ("1<x<2", "(1,2)"), (r"\frac{1}{2}", "0.5"), ("x+y", "y+x"), ("5", r"\text{five}")]
    assert any(reference_equal(left, right) != reference_equal(right, left) for left, right in pairs)
    for left, right in pairs:
        assert answers_equal(left, right) == answers_equal(right, left)
        assert answers_equal(left, right) == (reference_equal(left, right) or reference_equal(right, left))


def test_grading_works_in_a_thread_and_leaves_the_alarm_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    grades: list[Grade] = []
    thread = threading.Thread(target=lambda: grades.append(grade_math(r"\boxed{0.25}", r"\frac14")))
    thread.start()
    thread.join(30)
    assert grades == [Grade(1.0, "correct")]
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.parametrize(
    "module", ["megatron_laser.rewards", "megatron_laser.rewards.workers.worker_main", "megatron_laser.data"]
)
def test_importing_does_not_import_torch_or_math_verify(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'sympy', 'pyarrow') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    assert result.stdout.strip() == "[]"
