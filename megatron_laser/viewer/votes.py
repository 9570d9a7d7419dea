"""What a group's responses vote for: the plain majority, and weighted by their scores, as evaluations count them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_laser.algorithms.voting import majority_vote
from megatron_laser.rewards.answer_forms import MATHEMATICS, AnswerForm, answer_form
from megatron_laser.rewards.equivalence import equivalence_classes
from megatron_laser.rewards.grade import GradingPoolError
from megatron_laser.rewards.workers.grading_pool import GradingPool

logger = logging.getLogger(__name__)

_DEADLINE = 3.0  # seconds for the comparisons of a group's answers; what is undecided by then stands apart


class AnswerForms:
    """How each source's answers are read, from a run's config.yaml."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        reward = config.get("reward")
        self._default = _form((reward if isinstance(reward, dict) else {}).get("function"))
        self._own: dict[str, AnswerForm] = {}
        data = config.get("data")
        sources = (data if isinstance(data, dict) else {}).get("train")
        for source in sources if isinstance(sources, list) else []:
            if isinstance(source, dict) and source.get("reward"):
                name = source.get("name") or str(source.get("path")).rsplit("/", 1)[-1].rsplit(".", 1)[0]
                self._own[str(name)] = _form(source["reward"])

    def __call__(self, source: str) -> AnswerForm:
        """Of the source of this name; of `reward.function` where it has no verifier of its own."""
        return self._own.get(source, self._default)


def _form(function: object) -> AnswerForm:
    return MATHEMATICS if function is None else answer_form(function)


class Votes:
    """Counts votes; answers that only math_verify can compare go to one worker, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: GradingPool | None = None
        self._failed = False

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
                self._pool = None

    def of(
        self,
        answers: Sequence[str | None],
        rewards: Sequence[float | None],
        scores: Sequence[float | None],
        form: AnswerForm,
    ) -> dict[str, Any]:
        """{"majority": {"answer", "right", "counts"}, "weighted": the same, or null where nothing has a score}.

        All arguments: [responses]; an answer of None abstains.
        """
        classes = self._classes(answers, form)
        weights = [0.0 if score is None else min(max(score, 0.0), 1.0) for score in scores]
        scored = any(score is not None for score in scores)
        return {
            "majority": _vote(answers, rewards, classes, None),
            "weighted": _vote(answers, rewards, classes, weights) if scored else None,
        }

    def _classes(self, answers: Sequence[str | None], form: AnswerForm) -> list[int | None]:
        with self._lock:
            try:
                if self._pool is None and not self._failed and _is_hard(answers, form):
                    self._pool = GradingPool(workers=1)
                if self._pool is not None:
                    return equivalence_classes(answers, _DEADLINE, pool=self._pool, form=form)
            except (GradingPoolError, OSError) as error:
                logger.warning("votes go by the answers' spelling: no worker compares them (%s)", error)
                self._failed, self._pool = True, None
        known: list[str] = []
        classes: list[int | None] = []
        for answer in answers:
            if answer is None:
                classes.append(None)
                continue
            same = (number for number, other in enumerate(known) if form.quick_equal(other, answer))
            number = next(same, len(known))
            if number == len(known):
                known.append(answer)
            classes.append(number)
        return classes


def _is_hard(answers: Sequence[str | None], form: AnswerForm) -> bool:
    distinct = list(dict.fromkeys(answer for answer in answers if answer is not None))
    return any(
        form.quick_equal(left, right) is None
        for index, left in enumerate(distinct)
        for right in distinct[index + 1 :]
    )


def _vote(
    answers: Sequence[str | None],
    rewards: Sequence[float | None],
    classes: Sequence[int | None],
    weights: Sequence[float] | None,
) -> dict[str, Any]:
    winner = majority_vote(classes, weights=weights)
    first: dict[int, int] = {}
    totals: dict[int, float] = {}
    for index, number in enumerate(classes):
        if number is not None:
            first.setdefault(number, index)
            totals[number] = totals.get(number, 0) + (1 if weights is None else weights[index])
    won = None if winner is None else classes[winner]
    # The largest first, the winner before its equals.
    order = sorted(totals, key=lambda number: (-totals[number], number != won))
    reward = None if winner is None else rewards[winner]
    return {
        "answer": None if winner is None else answers[winner],
        "right": None if reward is None else reward > 0.5,
        "counts": [[answers[first[number]], round(totals[number], 5)] for number in order],
    }
