"""Equivalence classes of answers for voting."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from megatron_laser.rewards import GradingPool, equivalence_classes


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with GradingPool(workers=1, deadline=1.5) as pool:
        yield pool


def test_strings_and_integers_need_no_worker() -> None:
    assert equivalence_classes(["5", None, "6", "05", " 5 ", "$6$"]) == [0, None, 1, 0, 0, 1]
    assert equivalence_classes([]) == []
    assert equivalence_classes([None, None]) == [None, None]


def test_equal_values_share_a_class(pool: GradingPool) -> None:
    answers = ["0.5", r"\frac{1}{2}", "1", None, r"\dfrac12", "x+1", "1+x", "1.0"]
    assert equivalence_classes(answers, pool=pool) == [0, 0, 1, None, 0, 2, 2, 1]


def test_the_partition_does_not_depend_on_the_order(pool: GradingPool) -> None:
    answers = ["5", "x=5", "5.0", "y=5", "(1,2)", "1<x<2"]

    def partition(order: tuple[str, ...]) -> set[frozenset[str]]:
        classes = equivalence_classes(order, pool=pool)
        return {
            frozenset(answer for answer, number in zip(order, classes, strict=True) if number == wanted)
            for wanted in classes
        }

    partitions = [partition(order) for order in itertools.islice(itertools.permutations(answers), 0, 720, 37)]
    assert all(other == partitions[0] for other in partitions)


def test_an_answer_that_cannot_be_compared_stands_alone(pool: GradingPool) -> None:
    assert equivalence_classes(["9^{9^{9^9}}", "0.5", "1/2", "9^{9^{9^9}}"], pool=pool) == [0, 1, 1, 0]


def test_without_a_pool_a_worker_of_its_own_compares() -> None:
    assert equivalence_classes(["0.5", "1/2"], 60.0) == [0, 0]
