"""One trial of `reward.function` before anything expensive: the worker, the deadline and the user's code."""

from __future__ import annotations

import logging
import time

from megatron_laser.errors import Finding
from megatron_laser.rewards.answer_forms import MATHEMATICS, answer_form
from megatron_laser.rewards.grade import Grade, GradingPoolError, RewardSpecError
from megatron_laser.rewards.registry import is_math_verify
from megatron_laser.rewards.workers.grading_pool import GradingPool

logger = logging.getLogger(__name__)

_TOPIC = "reward function"
_CURE = "correct the function"
_CURE_LATE = (
    "correct the function, or raise reward.deadline where it needs longer; heavy imports belong to the top of its "
    "file, where they do not count"
)


def trial(
    function: str, answer: str = "42", *, deadline: float = 5.0, start_deadline: float = 60.0
) -> list[Finding]:
    """Grade two responses to one reference, one with the reference in a box and one without a box.

    A function that grades neither is an error, one that fails on one of them a warning (a response without a grade
    teaches nothing), and one to which the reference is worth no more a note. Built-in ones are not tried here: each
    of math_verify's workers grades an answer when it starts, and for the others the references are looked at.

    Args:
        function: `reward.function`.
        answer: a reference from the data.
        deadline: `reward.deadline`, seconds.
        start_deadline: seconds until the worker must have imported the function.
    """
    if is_math_verify(function):
        return [Finding(_TOPIC, "ok", "math_verify, built in")]
    if answer_form(function) is not MATHEMATICS:
        return [Finding(_TOPIC, "ok", f"{function}, built in")]
    responses = {
        "the reference in a box": f"The answer is \\boxed{{{answer}}}.",
        "a response without a box": "I do not know.",
    }
    grades: list[tuple[Grade, float]] = []
    failures: dict[str, list[str]] = {}  # why -> which responses
    try:
        with GradingPool(1, deadline, function, start_deadline=start_deadline, log_failures=False) as pool:
            for kind, response in responses.items():
                started = time.monotonic()
                grade = pool.grade_many([(response, answer)])[0]
                if grade.failed:
                    failures.setdefault(pool.last_trouble, []).append(kind)
                else:
                    grades.append((grade, time.monotonic() - started))
    except (RewardSpecError, GradingPoolError) as error:
        return [Finding(_TOPIC, "error", str(error))]
    cure = _CURE_LATE if any(why.startswith("timeout") for why in failures) else _CURE
    examples = tuple(f"{why} (on {' and '.join(which)})" for why, which in failures.items())
    of = f"reward.function {function!r}"
    if not grades:
        text = f"{of} graded neither of two trial responses (reference {answer!r:.80})"
        return [Finding(_TOPIC, "error", text, examples, cure)]
    if failures:
        text = f"{of} failed on one of two trial responses (reference {answer!r:.80}); what it fails on teaches nothing"
        return [Finding(_TOPIC, "warning", text, examples, cure)]
    slowest = max(seconds for _, seconds in grades)
    rewards = " and ".join(f"{grade.reward:g}" for grade, _ in grades)
    text = (
        f"{of} gave {rewards} for the reference in a box and for a response without one, in {slowest:.2f} s"
    )
    if slowest > deadline / 2:
        cure = "raise reward.deadline: a busy machine is slower"
        return [Finding(_TOPIC, "warning", f"{text}, more than half of reward.deadline", cure=cure)]
    (box, _), (no_box, _) = grades
    if box.reward <= no_box.reward:
        return [Finding(_TOPIC, "note", f"{text}: the reference itself is worth no more")]
    return [Finding(_TOPIC, "ok", text)]


def try_reward(function: str, answer: str = "42", *, deadline: float = 5.0) -> None:
    """`trial` where nobody reads findings: an error is raised, a warning logged.

    Raises:
        RewardSpecError: the function cannot be imported or called, or graded neither trial response.
    """
    for finding in trial(function, answer, deadline=deadline):
        if finding.level == "error":
            raise RewardSpecError(finding.line)
        if finding.level == "warning":
            logger.warning("%s", finding.line)
