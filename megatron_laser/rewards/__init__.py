"""Rewards: grading responses in killable worker processes, by math-verify or a custom function. No torch."""

from .boxed import extract_answer, find_last_box, has_exactly_one_box, normalize_answer
from .equivalence import equivalence_classes
from .grade import OUTCOMES, Grade, GradingPoolError, Outcome, RewardSpecError
from .math_grading import answers_equal, grade_math
from .pool import GradingPool
from .registry import is_math_verify, known_rewards, register_reward, resolve_reward
from .trial import trial, try_reward

__all__ = [
    "OUTCOMES",
    "Grade",
    "GradingPool",
    "GradingPoolError",
    "Outcome",
    "RewardSpecError",
    "answers_equal",
    "equivalence_classes",
    "extract_answer",
    "find_last_box",
    "grade_math",
    "has_exactly_one_box",
    "is_math_verify",
    "known_rewards",
    "normalize_answer",
    "register_reward",
    "resolve_reward",
    "trial",
    "try_reward",
]
