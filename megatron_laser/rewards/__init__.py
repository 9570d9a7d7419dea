"""Rewards: grading responses in killable worker processes, by math-verify or a custom function. No torch."""

from megatron_laser.rewards.answer_forms import MATHEMATICS, AnswerForm, answer_form
from megatron_laser.rewards.arguments import ARGUMENTS, Facts, may_want_row
from megatron_laser.rewards.equivalence import equivalence_classes
from megatron_laser.rewards.grade import OUTCOMES, Grade, GradingPoolError, Outcome, RewardSpecError
from megatron_laser.rewards.mathematics.boxed import (
    extract_answer,
    find_last_box,
    has_exactly_one_box,
    normalize_answer,
)
from megatron_laser.rewards.mathematics.grading import answers_equal, grade_math
from megatron_laser.rewards.registry import is_math_verify, known_rewards, register_reward, resolve_reward
from megatron_laser.rewards.terms import PLAIN, RewardRule, reward_rule
from megatron_laser.rewards.trial import trial, try_reward
from megatron_laser.rewards.workers.grading_pool import GradingPool

__all__ = [
    "ARGUMENTS",
    "MATHEMATICS",
    "OUTCOMES",
    "PLAIN",
    "AnswerForm",
    "Facts",
    "Grade",
    "GradingPool",
    "GradingPoolError",
    "Outcome",
    "RewardRule",
    "RewardSpecError",
    "answer_form",
    "answers_equal",
    "equivalence_classes",
    "extract_answer",
    "find_last_box",
    "grade_math",
    "has_exactly_one_box",
    "is_math_verify",
    "known_rewards",
    "may_want_row",
    "normalize_answer",
    "register_reward",
    "resolve_reward",
    "reward_rule",
    "trial",
    "try_reward",
]
