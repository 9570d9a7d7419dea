"""In a worker: the reward functions of a run, and the grade that their returned values make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from megatron_laser.rewards.answer_forms import MATHEMATICS, answer_form
from megatron_laser.rewards.grade import Grade, RewardSpecError
from megatron_laser.rewards.mathematics import grading as math_grading
from megatron_laser.rewards.registry import bind_reward, is_math_verify, resolve_reward
from megatron_laser.rewards.terms import RewardRule, parts_of
from megatron_laser.rewards.workers.user_code import definition

_Result = TypeVar("_Result")


class Grader:
    """`reward.function`, and the functions that terms have of their own.

    needs: which of `arguments.FACTS` they ask for.
    """

    def __init__(self, function: str, rule: Mapping[str, Any]) -> None:
        """Import all of them. `rule`: the fields of a `RewardRule`.

        Raises:
            RewardSpecError: one cannot be imported or called; names its setting.
        """
        self._rule = RewardRule(**rule)
        self._main = resolve_reward(function)
        bound = bind_reward(function, self._main)
        self._call = bound.call
        self._terms: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {}
        needs = bound.needs
        for name, spec in self._rule.functions.items():
            try:
                found = resolve_reward(spec)
                bound = bind_reward(spec, found)
            except RewardSpecError as error:
                place = f"reward.terms.{name}.function"
                raise RewardSpecError(str(error).replace("reward.function", place, 1)) from error
            self._terms[name] = (found, bound.call)
            needs |= bound.needs
        self.needs = needs
        if any(map(_is_built_in, (function, *self._rule.functions.values()))):
            math_grading.warm_up()  # its imports count here

    def grade(self, response: str, answer: str, facts: Mapping[str, Any]) -> Grade:
        """The grade of one response. Raises what the functions raise; TypeError or ValueError where it is none."""
        main = self._call(response, answer, facts)
        own: dict[str, object] = {}
        for name, (function, call) in self._terms.items():
            own[name] = call(response, answer, facts)
            _placed(function, lambda value=own[name]: parts_of(value))  # type: ignore[misc]
        return _placed(self._main, lambda: self._rule.grade(main, own))


def _is_built_in(function: str) -> bool:
    return answer_form(function) is not MATHEMATICS or is_math_verify(function)


def _placed(function: object, check: Callable[[], _Result]) -> _Result:
    """What `check` gives; its complaints are given the place of the function."""
    try:
        return check()
    except (TypeError, ValueError, OverflowError) as error:
        place = definition(function)
        raise type(error)(f"{error}{f' ({place})' if place else ''}") from None
