"""What grading one response gives, and the errors of this package."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from megatron_laser.errors import UserError

Outcome = Literal["correct", "wrong", "no_answer", "unparsable", "timeout", "crash"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
FAILED_OUTCOMES: tuple[str, ...] = ("timeout", "crash")
"""Grading failed, not the response: no verdict."""
NOT_ONE_GRADED = "not one response could be graded"
"""Why a run stops in a step, whose line of metrics is then missing: a report knows it by these words."""


class RewardSpecError(UserError, ValueError):
    """`reward.function` names no usable function."""


class GradingPoolError(UserError, RuntimeError):
    """The grading machinery itself failed: a worker cannot be started, or the pool was closed."""


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one response.

    Attributes:
        reward: the verifier's label r_v, 1.0 right and 0.0 wrong; from 0 to 1 for a custom function. Where a function
            returns it and `reward.threshold` makes the label, any finite number.
        outcome: correct, wrong, no_answer (no box), unparsable (a box that is unclosed, empty, too long, no
            mathematics, or undecided against the reference), timeout (the deadline passed) or crash (the function
            raised, returned nonsense, or its process died). Only the first four say
            something about the response.
        answer: the response's answer for votes; None: as the verifier's form reads it (`answer_forms`).
        terms: name -> value of each term (`terms.RewardRule`); a value of None: it does not apply to this response.
            None: there is one number only.
        policy_reward: what the policy learns from, where that is not `reward`; any finite number.
    """

    reward: float
    outcome: Outcome
    answer: str | None = None
    terms: Mapping[str, float | None] | None = field(default=None, hash=False)
    policy_reward: float | None = None

    @property
    def failed(self) -> bool:
        """Whether grading failed, not the response: such a reward is no label and must not be learned from."""
        return self.outcome in FAILED_OUTCOMES

    @property
    def learned(self) -> float:
        """The reward that the policy learns from."""
        return self.reward if self.policy_reward is None else self.policy_reward


def python_scalar(value: Any) -> Any:
    """A scalar of numpy, torch or jax, np.bool_ too, as Python's; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def as_grade(value: object) -> Grade:
    """Check what a reward function returned; a bare number above 0.5 counts as correct.

    Raises:
        TypeError: `value` is neither a Grade nor a real number.
        ValueError: the reward is not a number from 0 to 1, or the outcome is unknown. A larger one is refused,
            not scaled: it is the label that the self-reward score is trained towards.
    """
    value = python_scalar(value)
    if isinstance(value, Grade):
        if value.outcome not in OUTCOMES:
            raise ValueError(f"unknown outcome {value.outcome!r}; expected one of {', '.join(OUTCOMES)}")
        reward, outcome = python_scalar(value.reward), value.outcome
    elif isinstance(value, numbers.Real):  # bool, int and float
        reward, outcome = float(value), "correct" if float(value) > 0.5 else "wrong"
    else:
        raise TypeError(
            f"a reward function returns a number or a Grade, not {type(value).__name__} ({value!r:.60})"
        )
    if not isinstance(reward, numbers.Real) or not 0.0 <= float(reward) <= 1.0:  # NaN is neither
        raise ValueError(
            f"without reward.threshold a reward is a number from 0 (wrong) to 1 (right), not {reward!r}"
        )
    return Grade(float(reward), outcome)
