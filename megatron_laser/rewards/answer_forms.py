"""What an answer is to each built-in verifier, and which answers to one problem are the same: for votes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_laser.rewards.general.choices import extract_choice, multiple_choice, unusable_choice
from megatron_laser.rewards.general.short_text import extract_text, free_text, quick_same_text, text_form
from megatron_laser.rewards.mathematics.boxed import extract_answer
from megatron_laser.rewards.mathematics.grading import quick_equal


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How votes read and compare answers.

    Attributes:
        extract: (response, reference) to its answer, None where it has none.
        quick_equal: whether two answers are the same, None where math_verify has to decide.
        options_key: column of a data file with the options of a question; "" for none.
        unusable: why no response can equal a reference; "" where one can. None: `data.references` says so.
    """

    extract: Callable[[str, str], str | None]
    quick_equal: Callable[[str, str], bool | None]
    unusable: Callable[[str], str] | None = None
    options_key: str = ""


def _unusable_text(answer: str) -> str:
    return "" if text_form(answer) else "empty"


MATHEMATICS = AnswerForm(lambda response, reference: extract_answer(response), quick_equal)
_GENERAL = {
    multiple_choice: AnswerForm(
        extract_choice, lambda left, right: text_form(left) == text_form(right), unusable_choice, "options"
    ),
    free_text: AnswerForm(
        lambda response, reference: extract_text(response), quick_same_text, _unusable_text
    ),
}


def answer_form(function: object) -> AnswerForm:
    """Of a verifier, given as itself, by its name or by its place; boxes and mathematics for one of the user's own."""
    for known, form in _GENERAL.items():
        if function is known or function in (known.__name__, f"{known.__module__}:{known.__name__}"):
            return form
    return MATHEMATICS
