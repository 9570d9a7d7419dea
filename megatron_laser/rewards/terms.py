"""From what reward functions return to one grade: named terms, their weighted sum, and the label r_v.

Two numbers come out. The policy learns from the weighted sum of the terms, which may be any number. The self-reward
score is trained towards the label, and accuracy and votes count it: one term, or the sum, from 0 to 1, or whether that
reaches a threshold.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_laser.rewards.grade import OUTCOMES, Grade, Outcome, as_grade, python_scalar

if TYPE_CHECKING:  # a worker imports nothing of the settings
    from megatron_laser.config.schema.inputs import RewardConfig

REWARD = "reward"
"""The term that is `reward.function`'s one number, or the reward of its Grade."""
SUM = "sum"
"""As `reward.label`: the weighted sum."""
_NAME_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Parts:
    """What one function returned: its terms (None: not applicable), and what a Grade says besides."""

    values: dict[str, float | None]
    outcome: Outcome | None = None
    answer: str | None = None


@dataclass(frozen=True)
class RewardRule:
    """`reward.terms`, `reward.label` and `reward.threshold`.

    Attributes:
        weights: term -> its weight in the sum; empty: that of `reward` is 1.
        functions: term -> the place of a function of its own.
        label: the term, or `sum`, that says right or wrong.
        threshold: from which value of it on a response is right; None: the value is the label.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    functions: Mapping[str, str] = field(default_factory=dict)
    label: str = REWARD
    threshold: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether one number is both label and what the policy learns from."""
        return not self.weights and self.label == REWARD and self.threshold is None

    def grade(self, main: object, own: Mapping[str, object]) -> Grade:
        """The grade of one response.

        Args:
            main: what `reward.function` returned.
            own: term -> what its function returned.

        Raises:
            TypeError, ValueError: nothing can be made of them; says what was expected.
        """
        if self.is_plain and not isinstance(main, Mapping) and not _has_more(main):
            return as_grade(main)
        parts = parts_of(main)
        if parts.outcome is not None and Grade(0.0, parts.outcome).failed:
            return Grade(0.0, parts.outcome)
        values = dict(parts.values)
        for name, returned in own.items():
            if name in values:
                raise ValueError(
                    f"the term {name!r} is returned by reward.function and has a function of its own in reward.terms"
                )
            found = parts_of(returned)
            if found.outcome is not None and Grade(0.0, found.outcome).failed:
                return Grade(0.0, found.outcome)
            if found.values.keys() != {REWARD}:
                raise TypeError(
                    f"the function of the term {name!r} returns one number, not the terms {', '.join(found.values)}"
                )
            values[name] = found.values[REWARD]
        return self._combined(values, parts)

    def _combined(self, values: dict[str, float | None], parts: Parts) -> Grade:
        weights = self.weights or {REWARD: 1.0}
        needed = [*weights, *([] if self.label == SUM else [self.label])]
        if missing := [name for name in dict.fromkeys(needed) if name not in values]:
            raise ValueError(_missing(missing, list(values), self))
        total = math.fsum(
            weight * value for name, weight in weights.items() if (value := values[name]) is not None
        )
        judged = total if self.label == SUM else values[self.label]
        if judged is None:
            raise ValueError(
                f"the term {self.label!r} is None, not applicable to this response, and reward.label makes it the label"
            )
        if self.threshold is None and not 0.0 <= judged <= 1.0:
            raise ValueError(
                f"without reward.threshold the label ({self.label!r}, reward.label) is a number from 0 (wrong) to 1 "
                f"(right), not {judged!r}"
            )
        label = judged if self.threshold is None else float(judged >= self.threshold)
        if self.is_plain and parts.outcome is not None:
            outcome = parts.outcome
        elif label > 0.5:
            outcome = "correct"
        else:
            outcome = parts.outcome if parts.outcome in ("no_answer", "unparsable") else "wrong"
        shown = None if self.is_plain and values.keys() == {REWARD} else values
        return Grade(label, outcome, parts.answer, shown, None if self.is_plain else total)


PLAIN = RewardRule()


def reward_rule(settings: RewardConfig) -> RewardRule:
    """How terms and label are made."""
    return RewardRule(
        weights={name: term.weight for name, term in settings.terms.items()},
        functions={name: term.function for name, term in settings.terms.items() if term.function},
        label=settings.label,
        threshold=settings.threshold,
    )


def parts_of(value: object) -> Parts:
    """What one function returned, as terms.

    Raises:
        TypeError, ValueError: it is no number, Grade or dict of numbers.
    """
    value = python_scalar(value)
    if isinstance(value, Grade):
        if value.outcome not in OUTCOMES:
            raise ValueError(f"unknown outcome {value.outcome!r}; expected one of {', '.join(OUTCOMES)}")
        if value.answer is not None and not isinstance(value.answer, str):
            raise TypeError(f"Grade.answer is a text or None, not {type(value.answer).__name__}")
        terms = value.terms or {}
        if REWARD in terms:
            raise ValueError(f"Grade.terms must not hold {REWARD!r}: that is the Grade's own reward")
        return Parts(
            {REWARD: _number(REWARD, value.reward), **(_terms(terms) if terms else {})},
            value.outcome,
            value.answer,
        )
    if isinstance(value, Mapping):
        return Parts(_terms(value))
    if isinstance(value, numbers.Real):
        return Parts({REWARD: _number(REWARD, value)})
    raise TypeError(
        f"a reward function returns a number, a Grade or a dict of numbers, not {type(value).__name__} "
        f"({value!r:.60})"
    )


def _has_more(value: object) -> bool:
    return isinstance(value, Grade) and (value.answer is not None or bool(value.terms))


def _terms(values: Mapping[Any, object]) -> dict[str, float | None]:
    for name in values:
        if not isinstance(name, str):
            raise TypeError(f"the names of terms are texts, not {name!r:.60}")
        if not (name and name.isprintable() and len(name) <= _NAME_LENGTH):
            raise ValueError(
                f"the name of a term, which becomes a metric's, is a text of one line and up to {_NAME_LENGTH} "
                f"characters, not {name!r:.60}"
            )
        if name == SUM:
            raise ValueError(
                f"a term has another name than {SUM!r}, which is that of all together in reward.label"
            )
    if not values:
        raise ValueError("the function returned a dict without a term")
    return {
        name: None if value is None else _number(name, python_scalar(value)) for name, value in values.items()
    }


def _number(name: str, value: object) -> float:
    value = python_scalar(value)
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError(f"the term {name!r} is {value!r:.60}; expected a finite number, or None")
    return float(value)


def _missing(missing: list[str], found: list[str], rule: RewardRule) -> str:
    has = ", ".join(map(repr, found)) or "none"
    if not rule.weights:
        example = ", ".join(f"{name}: 1.0" for name in found)
        return (
            f"the function returned the terms {has}: give their weights, reward.terms: {{{example}}}, and in "
            "reward.label the term that says right or wrong"
        )
    lacking = ", ".join(map(repr, missing))
    where = (
        "reward.label names"
        if missing == [rule.label] and rule.label not in rule.weights
        else "reward.terms names"
    )
    if missing == [REWARD] and rule.label == REWARD and REWARD not in rule.weights:
        return (
            f"the function returned the terms {has}, of which none is the label: name in reward.label the one that "
            "says right or wrong, or sum"
        )
    return f"{where} {lacking}, and the function returned the terms {has}"
