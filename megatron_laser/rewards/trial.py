"""One trial of `reward.function` before anything expensive: the worker, the deadline and the user's code."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from megatron_laser.errors import Finding
from megatron_laser.rewards.answer_forms import MATHEMATICS, answer_form
from megatron_laser.rewards.arguments import Facts
from megatron_laser.rewards.grade import Grade, GradingPoolError, RewardSpecError
from megatron_laser.rewards.registry import is_math_verify
from megatron_laser.rewards.terms import PLAIN, RewardRule
from megatron_laser.rewards.workers.grading_pool import GradingPool

logger = logging.getLogger(__name__)

_TOPIC = "reward function"
_SHOWN_TERMS = 6
_CURE = "correct the function"
_CURE_LATE = (
    "correct the function, or raise reward.deadline where it needs longer; heavy imports belong to the top of its "
    "file, where they do not count"
)


class Example(Protocol):
    """A row of the data, as `data.Row`."""

    @property
    def answer(self) -> str:
        """The reference."""

    @property
    def problem(self) -> str:
        """The prompt column's text."""

    @property
    def columns(self) -> str:
        """The whole row as JSON, or ""."""


def trial(
    function: str,
    answer: str = "42",
    *,
    example: Example | None = None,
    deadline: float = 5.0,
    start_deadline: float = 60.0,
    rule: RewardRule = PLAIN,
    memory_limit_gib: float | None = 4.0,
    max_processes: int | None = None,
) -> list[Finding]:
    """Grade two responses to one reference, one with the reference in a box and one without a box.

    A function that grades neither is an error, one that fails on one of them a warning (a response without a grade
    teaches nothing), and one to which the reference is worth no more a note. Built-in ones are not tried here: each
    of math_verify's workers grades an answer when it starts, and for the others the references are looked at.

    Args:
        function: `reward.function`.
        answer: a reference. example: a row of the data, whose reference it is then.
        deadline: `reward.deadline`, seconds.
        start_deadline: seconds until the worker must have imported the function.
        rule, memory_limit_gib, max_processes: as of `GradingPool`.
    """
    if not rule.functions and rule.is_plain:
        if is_math_verify(function):
            return [Finding(_TOPIC, "ok", "math_verify, built in")]
        if answer_form(function) is not MATHEMATICS:
            return [Finding(_TOPIC, "ok", f"{function}, built in")]
    prompt, columns = "", ""
    if example is not None:
        answer, prompt, columns = example.answer, example.problem, example.columns
    responses = {
        "the reference in a box": f"The answer is \\boxed{{{answer}}}.",
        "a response without a box": "I do not know.",
    }
    grades: list[tuple[Grade, float]] = []
    failures: dict[str, list[str]] = {}  # why -> which responses
    try:
        with GradingPool(
            1,
            deadline,
            function,
            start_deadline=start_deadline,
            memory_limit_gib=memory_limit_gib,
            max_processes=max_processes,
            log_failures=False,
            rule=rule,
        ) as pool:
            for kind, response in responses.items():
                started = time.monotonic()
                facts = Facts(prompt, columns, "stop", len(response.split()))  # about so many tokens
                grade = pool.grade_many([(response, answer)], facts=[facts])[0]
                if grade.failed:
                    failures.setdefault(pool.last_trouble, []).append(kind)
                else:
                    grades.append((grade, time.monotonic() - started))
    except (RewardSpecError, GradingPoolError) as error:
        return [Finding(_TOPIC, "error", str(error))]
    cure = _CURE_LATE if any(why.startswith("timeout") for why in failures) else _CURE
    examples = tuple(f"{why} (on {' and '.join(which)})" for why, which in failures.items())
    of = f"reward.function {function!r}"
    short = function.rpartition("/")[2]  # a line of the log: the banner has the folder
    if not grades:
        text = f"{of} graded neither of two trial responses (reference {answer!r:.80})"
        return [Finding(_TOPIC, "error", text, examples, cure)]
    if failures:
        text = f"{of} failed on one of two trial responses (reference {answer!r:.80}); what it fails on teaches nothing"
        return [Finding(_TOPIC, "warning", text, examples, cure)]
    slowest = max(seconds for _, seconds in grades)
    for_box, for_no_box = (f"{grade.learned:g}{_shown(grade)}" for grade, _ in grades)
    text = f"{short} gave {for_box} for the reference in a box, {for_no_box} without one, in {slowest:.2f} s"
    if slowest > deadline / 2:
        cure = "raise reward.deadline: a busy machine is slower"
        return [Finding(_TOPIC, "warning", f"{text}, more than half of reward.deadline", cure=cure)]
    (box, _), (no_box, _) = grades
    if box.learned <= no_box.learned:
        return [Finding(_TOPIC, "note", f"{text}; the reference is worth no more")]
    return [Finding(_TOPIC, "ok", text)]


def _shown(grade: Grade) -> str:
    """What a reward is made of, and its label, where these are not the same number."""
    if grade.terms is None and grade.policy_reward is None:
        return ""
    values = list((grade.terms or {}).items())
    terms = [
        f"{name} {'not applicable' if value is None else f'{value:g}'}"
        for name, value in values[:_SHOWN_TERMS]
    ]
    if len(values) > _SHOWN_TERMS:
        terms.append(f"{len(values) - _SHOWN_TERMS} more terms")
    return f" ({', '.join([*terms, f'label {grade.reward:g}'])})"


def try_reward(
    function: str, example: Example | None = None, *, deadline: float = 5.0, rule: RewardRule = PLAIN
) -> None:
    """`trial` where nobody reads findings: an error is raised, a warning logged.

    Args:
        example: a row of the data; None: none is known.

    Raises:
        RewardSpecError: the function cannot be imported or called, or graded neither trial response.
    """
    for finding in trial(function, example=example, deadline=deadline, rule=rule):
        if finding.level == "error":
            raise RewardSpecError(finding.line)
        if finding.level == "warning":
            logger.warning("%s", finding.line)
