"""Mathematical answers against references: plain numbers and spelling at once, the rest with math-verify and SymPy.

The rules are those of LaSeR (arXiv 2510.14943): 1 if the last box equals the reference, else 0. An answer is brought to
one spelling (`normalization`), parsed (`answer_parser`; single expressions by math-verify's parser) and compared
(`answer_equality`).
Nothing here has a deadline; `GradingPool` runs it in processes that it can kill.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from megatron_laser.rewards.grade import Grade
from megatron_laser.rewards.mathematics.boxed import (
    extract_answer,
    find_last_box,
    gold_answer,
    normalize_answer,
)
from megatron_laser.rewards.mathematics.normalization import normalize_latex, number_value

CORRECT = Grade(1.0, "correct")
WRONG = Grade(0.0, "wrong")
NO_ANSWER = Grade(0.0, "no_answer")
UNPARSABLE = Grade(0.0, "unparsable")

_INTEGER = re.compile(r"[+-]?[0-9]+")


def grade_math(response: str, answer: str) -> Grade:
    """Grade a response by its last box, in this process and without a deadline.

    Args:
        response: the model's text.
        answer: the reference: plain, boxed or in `$...$`.

    Raises:
        MemoryError: comparing needed more memory than the process may have.
    """
    quick = quick_grade(response, answer)
    if quick is not None:
        return quick
    extracted = extract_answer(response)
    return UNPARSABLE if extracted is None else grade_extracted(extracted, gold_answer(answer))


def quick_grade(response: str, answer: str) -> Grade | None:
    """The grade where microseconds suffice, None where math-verify has to decide."""
    box = find_last_box(response)
    if box.state == "none":
        return NO_ANSWER
    extracted = normalize_answer(box.content)
    if box.state == "bad" or not extracted:
        return UNPARSABLE
    equal = quick_equal(extracted, gold_answer(answer))
    return None if equal is None else (CORRECT if equal else WRONG)


def quick_equal(left: str, right: str) -> bool | None:
    """Whether two normalised answers are equal, None where spelling and plain numbers do not settle it.

    What is settled here is what `compare_answers` says as well.
    """
    if left == right:
        return True
    (first, first_value), (second, second_value) = _normalized(left), _normalized(right)
    if first == second:
        return True
    if first_value is not None and second_value is not None:
        return first_value == second_value
    if _INTEGER.fullmatch(left) and _INTEGER.fullmatch(right):
        return False  # longer than what is read as a number, and no prediction is this long
    return None


def compare_answers(left: str, right: str) -> bool | None:
    """The relation behind grades and votes: the same answer, another one, or None where that is undecided.

    Symmetric. It is an equivalence but for what says less: 12 is equal to 12 cm and to 12 m, which differ, and an
    irrational number to every decimal that rounds it (to half of its last digit and to 1e-6 of it).

    Args:
        left, right: normalised answers.

    Raises:
        MemoryError: see `grade_math`.
    """
    quick = quick_equal(left, right)
    if quick is not None:
        return quick
    from megatron_laser.rewards.mathematics.answer_equality import (
        parsed_answers_equal,  # SymPy takes 0.3 s: only where it is used
    )
    from megatron_laser.rewards.mathematics.answer_parser import parse_answer

    try:
        return parsed_answers_equal(parse_answer(left), parse_answer(right))
    except MemoryError:
        raise  # not a verdict on the answer
    except Exception:  # SymPy raises anything on odd input
        return None


def grade_extracted(extracted: str, gold: str) -> Grade:
    """The grade of a normalised answer against a normalised reference; unparsable where `compare_answers` is undecided.

    Raises:
        MemoryError: see `grade_math`.
    """
    equal = compare_answers(extracted, gold)
    return UNPARSABLE if equal is None else CORRECT if equal else WRONG


def answers_equal(left: str, right: str) -> bool:
    """Whether two normalised answers are known to be equal: `grade_extracted` gives correct, either way round."""
    return compare_answers(left, right) is True


def warm_up() -> None:
    """Import math-verify and build its regular expressions and parser tables (0.4 s)."""
    compare_answers(r"\sqrt{2}", "x+1")


@lru_cache(maxsize=8192)
def _normalized(answer: str) -> tuple[str, Fraction | None]:
    text = normalize_latex(answer)
    return text, number_value(text)
