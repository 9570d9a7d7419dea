"""Which answers to one problem are the same, for voting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from megatron_laser.rewards.answer_forms import MATHEMATICS, AnswerForm
from megatron_laser.rewards.mathematics.boxed import normalize_answer
from megatron_laser.rewards.workers.grading_pool import GradingPool


def equivalence_classes(
    answers: Sequence[str | None],
    deadline: float | None = None,
    *,
    pool: GradingPool | None = None,
    form: AnswerForm = MATHEMATICS,
) -> list[int | None]:
    """Group extracted answers by the relation that grades too: one class where one would be right for the other.

    The classes are the connected components over all pairs, hence independent of the answers' order (see
    `mathematics.grading.compare_answers`; what it cannot decide stands apart).

    Args:
        answers: one per response (see `extract_answer`); None abstains.
        deadline: seconds for all comparisons; None: as long as they can take at worst. Pairs that are not
            decided by then count as unequal.
        pool: whose workers compare; None starts one worker for this call where one is needed (0.5 s).
        form: what settles pairs without a worker; see `answer_forms`.

    Returns:
        For each answer its class, numbered from 0 by first appearance; None where the answer is None.

    Raises:
        GradingPoolError: as in `GradingPool.grade_many`.
    """
    normalized = [None if answer is None else normalize_answer(answer) for answer in answers]
    distinct = list(dict.fromkeys(answer for answer in normalized if answer is not None))
    parent = {answer: answer for answer in distinct}

    def root(answer: str) -> str:
        while parent[answer] != answer:
            parent[answer] = parent[parent[answer]]
            answer = parent[answer]
        return answer

    hard: list[tuple[str, str]] = []
    for left, right in combinations(distinct, 2):
        equal = form.quick_equal(left, right)
        if equal:
            parent[root(right)] = root(left)
        elif equal is None:
            hard.append((left, right))
    # pairs that the quick equalities have joined already cannot change the components
    hard = [(left, right) for left, right in hard if root(left) != root(right)]
    if hard:
        if pool is None:
            with GradingPool(workers=1) as own_pool:
                verdicts = own_pool.equal_many(hard, deadline)
        else:
            verdicts = pool.equal_many(hard, deadline)
        for (left, right), equal in zip(hard, verdicts, strict=True):
            if equal:
                parent[root(right)] = root(left)

    numbers: dict[str, int] = {}
    return [
        None if answer is None else numbers.setdefault(root(answer), len(numbers)) for answer in normalized
    ]
