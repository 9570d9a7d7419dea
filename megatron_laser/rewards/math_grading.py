"""Mathematical answers against references: quick decisions on strings and integers, the rest by math-verify.

The rules are those of LaSeR (arXiv 2510.14943): 1 if the last box equals the reference, else 0.
Nothing here has a deadline; `GradingPool` runs it in processes that it can kill.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from .boxed import MAX_ANSWER_CHARS, extract_answer, find_last_box, gold_answer, normalize_answer
from .grade import Grade

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
    """Whether two normalised answers are equal, None where strings and integers do not settle it."""
    if left == right:
        return True
    if _INTEGER.fullmatch(left) and _INTEGER.fullmatch(right):
        if len(left) > MAX_ANSWER_CHARS or len(right) > MAX_ANSWER_CHARS:
            return False  # beyond Python's digit limit, and no prediction is this long
        return int(left) == int(right)
    return None


def grade_extracted(extracted: str, gold: str) -> Grade:
    """math-verify's verdict on two normalised answers.

    Raises:
        MemoryError: see `grade_math`.
    """
    target = _parse(extracted)
    if _verify(_parse(gold), target):
        return CORRECT
    return WRONG if any(not isinstance(value, str) for value in target) else UNPARSABLE


def answers_equal(left: str, right: str) -> bool:
    """Symmetric equality of two normalised answers: math-verify in either direction.

    math-verify alone is not symmetric (assignments and relations take the reference's form).
    """
    quick = quick_equal(left, right)
    if quick is not None:
        return quick
    first, second = _parse(left), _parse(right)
    return _verify(first, second) or _verify(second, first)


def warm_up() -> None:
    """Import math-verify and build its regular expressions and parser tables (0.4 s)."""
    grade_extracted(r"\frac{1}{2}", "0.5")


@lru_cache(maxsize=2048)  # references repeat over a group, and answers over the pairs of a vote
def _parse(answer: str) -> list[Any]:
    """math-verify's readings of one answer: SymPy objects and, last, the string; [] when it has none."""
    if len(answer) > MAX_ANSWER_CHARS:
        return []
    library = _math_verify()
    # None: the library's own time-outs are SIGALRM, which only a main thread can use and C code defies
    return library.parse(
        f"\\boxed{{{answer}}}",
        extraction_config=[library.LatexExtractionConfig(boxed_match_priority=0)],
        parsing_timeout=None,
    )


def _verify(gold: list[Any], target: list[Any]) -> bool:
    library = _math_verify()
    for left in gold:
        for right in target:
            if _is_equation_for_zero(left, right) or _is_equation_for_zero(right, left):
                continue
            try:
                if library.verify(left, right, timeout_seconds=None, raise_on_error=True):
                    return True
            except MemoryError:
                raise  # not a verdict on the answer
            except Exception:  # SymPy raises anything on odd input; math-verify counts that as unequal too
                continue
    return False


def _is_equation_for_zero(value: Any, equation: Any) -> bool:
    """Whether `equation` is one like 5x - 7y + 4 = 0 and `value` is none.

    math-verify reads an equation as its right side where the other answer is none, which is right for x = 5 and
    m + n = 25. But an equation in standard form (a constant on the left, 0 on the right) is not the answer 0.
    """
    from sympy import Add, Eq
    from sympy.core.relational import Relational

    if not isinstance(equation, Eq) or isinstance(value, (str, Relational)):
        return False
    terms = Add.make_args(equation.lhs)
    return (
        equation.rhs == 0
        and len(terms) > 1
        and any(term.is_number for term in terms)
        and not equation.lhs.is_number
    )


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import math_verify  # 0.3 s with SymPy: only where it is used

    # its loggers warn, once a process, that the time-outs are off
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
