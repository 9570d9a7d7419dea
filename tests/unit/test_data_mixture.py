"""Prompts of several sources: exact shares at every prompt, epochs of each source, and exact resumption."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction

import pytest

from megatron_laser.data import DataError, MixedCursor, MixedSource, PromptCursor

WEIGHTS = [
    [1, 1],
    [1, 3],
    [997, 3],
    [1, 1, 1],
    [5, 3, 2],
    [100, 10, 1, 1],
    [7, 7, 7, 1, 1, 1, 1],  # where always taking the largest remainder gets more than one prompt off
    [1] * 12 + [20],
]
SIZES = (3, 7, 4, 5)


def mixture(weights, sizes=SIZES, *, shuffle=True, names=None, data="x"):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    return MixedCursor(
        [
            MixedSource(
                (names or [f"s{place}" for place in range(len(weights))])[place],
                share,
                PromptCursor(sizes[place % len(sizes)], 11, shuffle, data_fingerprint=data, stream=place),
            )
            for place, share in enumerate(shares)
        ]
    )


def source_of(position, sizes):
    for place, size in enumerate(sizes):
        if position < size:
            return place
        position -= size
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_after_every_prompt_each_source_is_within_one_of_its_share(weights):
    sizes = [SIZES[place % len(SIZES)] for place in range(len(weights))]
    cursor, given = mixture(weights), Counter()
    bound = 1 - Fraction(1, 2 * len(weights) - 2)  # Tijdeman's
    for number in range(1, 3 * sum(weights) + 1):
        ((position, _),) = cursor.take(1)
        given[source_of(position, sizes)] += 1
        for place, weight in enumerate(weights):
            assert abs(given[place] - number * Fraction(weight, sum(weights))) <= bound
        if number % sum(weights) == 0:  # a whole turn: nobody is owed anything
            assert [given[place] * sum(weights) for place in range(len(weights))] == [
                w * number for w in weights
            ]


def test_each_source_repeats_by_itself_and_shuffles_each_epoch():
    taken = mixture([1, 1], (4, 8)).take(32)
    for first, size in ((0, 4), (4, 8)):
        mine = [(position - first, epoch) for position, epoch in taken if first <= position < first + size]
        assert len(mine) == 16
        epochs = [[p for p, of in mine if of == epoch] for epoch in range(16 // size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_sources_of_one_size_have_orders_of_their_own():
    taken = mixture([1, 1], (30, 30)).take(60)
    first = [position for position, _ in taken if position < 30]
    second = [position - 30 for position, _ in taken if position >= 30]
    assert sorted(first) == sorted(second) and first != second


def test_without_shuffling_sources_take_turns_in_the_order_of_the_files():
    taken = mixture([2, 1], (3, 2), shuffle=False).take(9)
    assert taken == [(0, 0), (3, 0), (1, 0), (2, 0), (4, 0), (0, 1), (1, 1), (3, 1), (2, 1)]


@pytest.mark.parametrize("before", [0, 1, 5, 17, 40])
def test_the_state_in_json_resumes_exactly_and_pieces_do_not_matter(before):
    whole = mixture([5, 3, 2]).take(60)
    cursor = mixture([5, 3, 2])
    pieces = [cursor.take(1) for _ in range(before)]
    assert [one for piece in pieces for one in piece] == whole[:before]
    resumed = mixture([5, 3, 2])
    resumed.take(3)
    resumed.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    assert resumed.take(60 - before) == whole[before:]
    assert resumed.progress_by_source()["s0"] == 30 / 3 and resumed.progress == 60 / 14


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: mixture([5, 3, 1]), r"another mixture: saved s0 0.5, s1 0.3, s2 0.2, now s0 0.5556"),
        (lambda: mixture([5, 3, 2], names=["s0", "b", "s2"]), "now s0 0.5, b 0.3, s2 0.2"),
        (lambda: mixture([5, 3, 2], data="y"), r"source 's0': .*saved 'x', now 'y'"),
        (lambda: mixture([5, 3, 2], (3, 7, 9)), r"source 's2': .*num_prompts: saved 4, now 9"),
        (lambda: PromptCursor(14, 11, True), "over several sources of data.train, which names one now"),
    ],
)
def test_a_state_of_other_sources_is_refused_and_changes_nothing(other, message):
    saved = mixture([5, 3, 2])
    saved.take(9)
    cursor, same = other(), other()
    with pytest.raises(DataError, match=message):
        cursor.load_state_dict(saved.state_dict())
    assert cursor.take(20) == same.take(20)


def test_a_state_of_one_source_is_refused_by_a_mixture():
    with pytest.raises(DataError, match=r"over one source, and data\.train has several now"):
        mixture([1, 1]).load_state_dict(PromptCursor(3, 11, True).state_dict())


def test_shares_that_do_not_add_up_are_refused():
    one, half = PromptCursor(3, 1, True), Fraction(1, 2)
    for sources in (
        [MixedSource("a", Fraction(1), one)],
        [MixedSource("a", half, one), MixedSource("b", Fraction(1, 3), one)],
        [MixedSource("a", Fraction(0), one), MixedSource("b", Fraction(1), one)],
        [MixedSource("a", half, one), MixedSource("a", half, one)],
    ):
        with pytest.raises(ValueError):
            MixedCursor(sources)
