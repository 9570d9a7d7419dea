"""The invariants in the docstring of `build_schedule`, on random batches."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laser.batching import build_schedule


@st.composite
def batches(draw):
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=12))
    total = sum(sizes)
    return {
        "lengths": draw(st.lists(st.integers(1, 120), min_size=total, max_size=total)),
        "group_ids": [group for group, size in enumerate(sizes) for _ in range(size)],
        "data_parallel": draw(st.integers(1, 5)),
        "tokens_per_micro_batch": draw(st.integers(1, 300)),
        "minibatches": draw(st.integers(1, len(sizes))),
        "micro_batch_multiple": draw(st.integers(1, 4)),
    }


def tokens(members, lengths):
    return sum(lengths[i] for i in members)


def samples_of(ranks):
    return sorted(i for micro_batches in ranks for members in micro_batches for i in members)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_every_sample_is_in_exactly_one_micro_batch_of_its_minibatch(batch):
    schedule = build_schedule(**batch)
    assert len(schedule.minibatches) == batch["minibatches"]
    in_order = [i for ranks in schedule.minibatches for i in samples_of(ranks)]
    assert in_order == list(range(len(batch["lengths"])))  # once each, and minibatches are contiguous runs
    groups = [{batch["group_ids"][i] for i in samples_of(ranks)} for ranks in schedule.minibatches]
    assert sum(map(len, groups)) == len(set(batch["group_ids"]))  # no group is split
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@settings(max_examples=150, deadline=None)
@given(batches())
def test_micro_batches_respect_the_token_budget(batch):
    for ranks in build_schedule(**batch).minibatches:
        for members in (members for micro_batches in ranks for members in micro_batches):
            within = tokens(members, batch["lengths"]) <= batch["tokens_per_micro_batch"]
            assert within or len(members) == 1
            assert list(members) == sorted(members)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_all_ranks_run_the_same_number_of_micro_batches(batch):
    schedule = build_schedule(**batch)
    for index, ranks in enumerate(schedule.minibatches):
        count = schedule.num_micro_batches(index)
        assert len(ranks) == batch["data_parallel"] and {len(rank) for rank in ranks} == {count}
        assert count >= 1 and count % batch["micro_batch_multiple"] == 0
        # No more than the busiest rank needs: an upper bound on first fit is two per full budget, plus one.
        most = max(sum(tokens(m, batch["lengths"]) for m in rank) for rank in ranks)
        needed = 2 * most // batch["tokens_per_micro_batch"] + 1
        assert count < max(needed, 1) + batch["micro_batch_multiple"]


@settings(max_examples=150, deadline=None)
@given(batches())
def test_ranks_are_balanced_to_within_one_sample(batch):
    for ranks in build_schedule(**batch).minibatches:
        loads = [sum(tokens(members, batch["lengths"]) for members in rank) for rank in ranks]
        longest = max(batch["lengths"][i] for i in samples_of(ranks))
        assert max(loads) - min(loads) <= longest


@settings(max_examples=100, deadline=None)
@given(batches())
def test_micro_batches_run_from_most_to_fewest_tokens(batch):
    for ranks in build_schedule(**batch).minibatches:
        for rank in ranks:
            sizes = [tokens(members, batch["lengths"]) for members in rank]
            assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=50, deadline=None)
@given(batches())
def test_the_schedule_depends_on_the_arguments_only(batch):
    expected = build_schedule(**batch)
    random.seed(0)
    assert build_schedule(**{key: batch[key] for key in reversed(batch)}) == expected


def test_ranks_without_samples_get_empty_micro_batches():
    schedule = build_schedule([5, 3], data_parallel=4, tokens_per_micro_batch=8, micro_batch_multiple=2)
    assert schedule.minibatches == ((((0,), ()), ((1,), ()), ((), ()), ((), ())),)


def test_micro_batches_of_a_rank_are_filled_evenly():
    schedule = build_schedule([6, 2, 4, 4, 4, 4], data_parallel=1, tokens_per_micro_batch=13)
    assert schedule.minibatches == ((((0, 1, 4), (2, 3, 5)),),)


def test_tight_budgets_keep_the_fewest_micro_batches():
    # Longest-first into the emptiest of two bins gives 7 + 4 + 4 = 15 tokens; 7 + 6 and 5 + 4 + 4 fit in 13.
    schedule = build_schedule([7, 6, 5, 4, 4], data_parallel=1, tokens_per_micro_batch=13)
    assert schedule.minibatches == ((((0, 1), (2, 3, 4)),),)


def test_a_sample_over_the_budget_is_alone():
    schedule = build_schedule([50, 1, 2], data_parallel=1, tokens_per_micro_batch=10)
    assert schedule.minibatches == ((((0,), (1, 2)),),)


def test_uneven_groups_go_to_minibatches_whole():
    schedule = build_schedule(
        [1] * 6, data_parallel=1, tokens_per_micro_batch=10, minibatches=2, group_ids=[7, 7, 7, 7, 1, 1]
    )
    assert schedule.minibatches == ((((0, 1, 2, 3),),), (((4, 5),),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_parallel": 0}, "data_parallel=0"),
        ({"tokens_per_micro_batch": 0}, "tokens_per_micro_batch=0"),
        ({"micro_batch_multiple": 0}, "micro_batch_multiple=0"),
        ({"lengths": [3, 0, 1]}, r"lengths\[1\]=0"),
        ({"minibatches": 4}, "policy.minibatches=4: expected at most the 3"),
        ({"group_ids": [0, 1]}, "2 entries for 3 samples"),
        ({"group_ids": [0, 1, 0]}, "next to each other"),
    ],
)
def test_arguments_that_make_no_schedule_are_refused(change, message):
    arguments = {"lengths": [3, 2, 1], "data_parallel": 1, "tokens_per_micro_batch": 8}
    with pytest.raises(ValueError, match=message):
        build_schedule(**{**arguments, **change})


@settings(max_examples=150, deadline=None)
@given(batches(), st.data())
def test_costs_are_balanced_within_the_budget_of_tokens(batch, data):
    count = len(batch["lengths"])
    costs = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    schedule = build_schedule(**batch, costs=costs)
    assert sorted(i for ranks in schedule.minibatches for i in samples_of(ranks)) == list(range(count))
    for ranks in schedule.minibatches:
        loads = [sum(tokens(members, costs) for members in rank) for rank in ranks]
        assert max(loads) - min(loads) <= max(costs[i] for i in samples_of(ranks))
        assert len({len(rank) for rank in ranks}) == 1
        for rank in ranks:
            sizes = [tokens(members, costs) for members in rank]
            assert sizes == sorted(sizes, reverse=True)
            for members in rank:
                within = tokens(members, batch["lengths"]) <= batch["tokens_per_micro_batch"]
                assert within or len(members) == 1


@settings(max_examples=50, deadline=None)
@given(batches())
def test_without_costs_tokens_are_balanced(batch):
    assert build_schedule(**batch) == build_schedule(**batch, costs=batch["lengths"])


def test_an_even_cut_by_costs_keeps_within_the_budget_where_there_is_room():
    # The cheapest bin is full of tokens by then: the last short one goes where room is left.
    lengths, costs = [10, 6, 4, 4, 4, 2], [100, 36, 3, 3, 3, 1]
    schedule = build_schedule(lengths, data_parallel=1, tokens_per_micro_batch=16, costs=costs)
    ((micro_batches,),) = schedule.minibatches
    assert len(micro_batches) == 2
    assert micro_batches == ((0, 5), (1, 2, 3, 4)) or all(
        sum(lengths[i] for i in members) <= 16 for members in micro_batches
    )


def test_a_long_sample_is_alone_where_its_attention_costs_most():
    lengths = [80, 40, 40, 40, 40]
    even = build_schedule(lengths, data_parallel=2, tokens_per_micro_batch=400)
    assert samples_of([even.minibatches[0][0]]) == [0, 3]
    quadratic = build_schedule(
        lengths, data_parallel=2, tokens_per_micro_batch=400, costs=[n * n for n in lengths]
    )
    assert samples_of([quadratic.minibatches[0][0]]) == [0]


def test_imbalance_is_the_busiest_rank_over_the_mean_one():
    schedule = build_schedule([4, 3, 2], data_parallel=2, tokens_per_micro_batch=10)
    assert schedule.imbalance([4, 3, 2]) == pytest.approx(5 / 4.5 - 1)
    assert schedule.imbalance([9, 3, 6]) == pytest.approx(0.0)


def test_costs_of_another_number_of_samples_are_refused():
    with pytest.raises(ValueError, match="costs has 1 entries for 2 samples"):
        build_schedule([1, 2], data_parallel=1, tokens_per_micro_batch=10, costs=[1.0])
