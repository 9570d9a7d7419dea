"""Choosing one of several answers to a question by their scores: what the proxy and the Python API do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_laser.algorithms.voting import best_of, majority_vote
from megatron_laser.errors import TestTimeError
from megatron_laser.rewards import MATHEMATICS, AnswerForm, GradingPool, equivalence_classes

Vote = Literal["weighted_majority", "majority", "best_of"]
VOTES: tuple[str, ...] = get_args(Vote)


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen response.

    Attributes:
        index: of the response, among those given.
        method: the vote; `best_of_all` where no response has a boxed answer and the best score decides alone.
        answer: its boxed answer, None without one.
        share: of the votes (of the weights in a weighted majority) that its answer has; None where there was
            no vote.
        classes: for each response the number of its answer, equal for equal answers; None without an answer.
    """

    index: int
    method: str
    answer: str | None
    share: float | None
    classes: list[int | None]


def choose(
    responses: Sequence[str],
    scores: Sequence[float | None],
    *,
    vote: str = "weighted_majority",
    pool: GradingPool | None = None,
    deadline: float | None = None,
    form: AnswerForm = MATHEMATICS,
) -> Choice:
    """Vote among responses by their answers; without `form` by their boxes, equal by math-verify in either direction.

    Of the responses that give the winning answer the one with the best score is chosen. Weights are
    clamp(score, 0, 1); a response without a score has weight 0.

    Args:
        responses: texts. scores: raw scores r_s, None without one (truncated).
        pool, deadline: as in `rewards.equivalence_classes`.
        form: `rewards.answer_form` of the verifier that the model was trained with.

    Raises:
        TestTimeError: no responses, or an unknown vote.
    """
    if not responses:
        raise TestTimeError("there is no response to choose from; expected one or more")
    if vote not in VOTES:
        raise TestTimeError(f"vote {vote!r}: expected {', '.join(VOTES)}")
    answers = [form.extract(response, "") for response in responses]
    classes = equivalence_classes(answers, deadline, pool=pool, form=form)
    weights = [0.0 if score is None else min(max(score, 0.0), 1.0) for score in scores]
    if all(number is None for number in classes):
        index = best_of([0] * len(responses), scores)
        return Choice(index or 0, "best_of_all", None, None, classes)
    if vote == "best_of":
        index = best_of(classes, scores) or 0
        return Choice(index, vote, answers[index], None, classes)
    counted = weights if vote == "weighted_majority" else [1.0] * len(weights)
    winner = majority_vote(classes, weights=counted)
    won = None if winner is None else classes[winner]
    members = [place if number == won else None for place, number in enumerate(classes)]
    index = best_of(members, scores) or 0
    total = sum(weight for weight, number in zip(counted, classes) if number is not None)
    mine = sum(weight for weight, number in zip(counted, classes) if number == won)
    return Choice(index, vote, answers[index], mine / total if total > 0 else None, classes)
