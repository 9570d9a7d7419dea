"""Slices of a vocabulary: covered once, no wider than memory allows, in whole waves of a product's tiles."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_laser.ops.slices import group_slices, row_blocks, slice_widths, waste, waves

MIB = 2**20


def widest(rows: int, tile_bytes: int) -> int:
    """Columns of float32 logits that fit into a tile."""
    return tile_bytes // 4 // rows


def test_waves_are_counted_in_the_better_orientation_of_the_tile() -> None:
    assert waves(128, 256, 1) == waves(256, 128, 1) == 1
    assert waves(129, 256, 1) == 2 and waves(384, 128, 1) == 2
    assert waves(16384, 8448, 132) == 32 and waves(8448, 5120, 132) == 10 and waves(8448, 3584, 132) == 7


def test_a_32b_head_is_cut_into_18_slices_without_a_partly_filled_wave() -> None:
    widths = slice_widths(16384, 5120, 152064, widest=widest(16384, 528 * MIB), multiprocessors=132)

    assert widths == [8448] * 18
    found = waste(16384, 5120, widths, 132)
    assert found.logits == found.weight_gradient == 1.0
    assert found.hidden_gradient == pytest.approx(20 / 19.39, abs=1e-3)


def test_waste_of_the_even_slices_of_512_mib_is_what_the_waves_say() -> None:
    """18 slices of 8064 columns and one of 6912, as an even cut of the vocabulary gives."""
    found = waste(16384, 5120, [8064] * 18 + [6912], 132)

    assert found == pytest.approx((1.016, 1.031, 1.050), abs=1e-3)


@pytest.mark.parametrize(
    ("rows", "hidden", "columns", "most_logits", "most_weight"),
    [
        (16384, 5120, 152064, 1.0, 1.0),
        (16384, 3584, 152064, 1.0, 1.0),
        (16384, 5120, 19008, 1.028, 1.023),
        (16384, 3584, 19008, 1.028, 1.017),
        (16384, 4096, 128256, 1.001, 1.005),
        (16384, 2048, 151936, 1.002, 1.002),
        (8192, 5120, 152064, 1.0, 1.0),
        (12000, 5120, 152064, 1.024, 1.0),
    ],
)
def test_common_heads_waste_little(
    rows: int, hidden: int, columns: int, most_logits: float, most_weight: float
) -> None:
    widths = slice_widths(rows, hidden, columns, widest=widest(rows, 528 * MIB), multiprocessors=132)
    found = waste(rows, hidden, widths, 132)

    assert found.logits <= most_logits and found.weight_gradient <= most_weight


def test_every_column_is_covered_once_and_no_slice_is_wider_than_memory_allows_or_tiny() -> None:
    random_shape = random.Random(0)
    for _ in range(2000):
        rows, hidden = random_shape.randint(1, 20000), random_shape.randint(1, 8192)
        columns = random_shape.choice((random_shape.randint(1, 400), random_shape.randint(1, 200_000)))
        most = random_shape.choice((random_shape.randint(1, 300), random_shape.randint(1000, 20_000)))
        columns = min(columns, 500 * most)
        multiprocessors = random_shape.choice((2, 78, 114, 132, 148))

        widths = slice_widths(rows, hidden, columns, widest=most, multiprocessors=multiprocessors)

        shape = (rows, hidden, columns, most, multiprocessors, widths)
        assert sum(widths) == columns and max(widths) <= most and min(widths) >= 1, shape
        if min(most, columns) >= 128:
            assert all(width % 128 == 0 for width in widths[:-1]), shape
            # Two halves of an uneven pair differ by less than a multiple of 128.
            assert widths[-1] >= min(widths[0] / 2 - 128, columns) and widths[-1] >= min(columns, 1), shape


def test_the_plan_is_as_fast_as_the_best_of_all_cuts_into_two_widths() -> None:
    """The search looks at one width and a remainder; any mix of two widths in any number is no more than 1 % better."""

    def total(rows: int, hidden: int, widths: list[int]) -> int:
        return sum(waves(rows, w, 132) * hidden + waves(w, hidden, 132) * rows for w in widths)

    for rows, hidden, columns in ((16384, 5120, 152064), (16384, 5120, 19008), (8192, 4096, 32000)):
        most = widest(rows, 528 * MIB)
        plan = total(rows, hidden, slice_widths(rows, hidden, columns, widest=most, multiprocessors=132))
        others = []
        choices = range(most // 128 * 128, most // 2, -128)
        for one, other in itertools.combinations(choices, 2):
            for count in range(columns // one + 1):
                more, rest = divmod(columns - count * one, other)
                others.append(total(rows, hidden, [one] * count + [other] * more + [rest] * (rest > 0)))
        assert plan <= 1.01 * min(others)


def test_rows_that_fill_the_same_tiles_share_a_plan() -> None:
    arguments = {"widest": 8448, "multiprocessors": 132}

    assert slice_widths(16300, 5120, 152064, **arguments) == slice_widths(16384, 5120, 152064, **arguments)


def test_tiny_tiles_and_no_columns() -> None:
    assert slice_widths(7, 16, 5, widest=1, multiprocessors=2) == [1] * 5
    assert slice_widths(7, 16, 300, widest=130, multiprocessors=2) == [128, 128, 44]
    assert slice_widths(7, 16, 100, widest=10_000, multiprocessors=2) == [100]
    assert slice_widths(7, 16, 0, widest=10, multiprocessors=2) == []
    with pytest.raises(ValueError, match="widest=0"):
        slice_widths(7, 16, 100, widest=0, multiprocessors=2)


def test_groups_are_few_and_even() -> None:
    def columns(widths: list[int], most: int) -> list[int]:
        return [sum(widths[group]) for group in group_slices(widths, most)]

    assert columns([8448] * 18, 4 * 8448) == [3 * 8448, 3 * 8448] + [4 * 8448] * 3
    assert columns([8448] * 18, 3 * 8448) == [3 * 8448] * 6
    assert columns([5, 5, 5, 3], 9) == [5, 5, 8]
    assert columns([5, 30, 5], 10) == [5, 30, 5]  # One slice is never cut.
    assert columns([], 10) == []


def test_groups_cover_every_slice_once_and_hold_no_more_than_asked() -> None:
    random_widths = random.Random(0)
    for _ in range(200):
        widths = [random_widths.randint(1, 20) for _ in range(random_widths.randint(1, 60))]
        most = random_widths.randint(1, 80)

        groups = group_slices(widths, most)

        assert [i for group in groups for i in range(group.start, group.stop)] == list(range(len(widths)))
        for group in groups:
            assert sum(widths[group]) <= most or group.stop - group.start == 1


def test_blocks_of_rows_are_whole_waves_too() -> None:
    assert row_blocks(16384, 5120, 152064, most=4110, multiprocessors=132) == [4096] * 4
    blocks = row_blocks(16384, 3584, 152064, most=4800, multiprocessors=132)

    # dX [4096, 3584] is 3.4 waves and takes 4.
    assert sum(blocks) == 16384 and max(blocks) <= 4800
    assert sum(waves(block, 3584, 132) for block in blocks) < 4 * waves(4096, 3584, 132) == 16
    assert row_blocks(5, 16, 40, most=2, multiprocessors=2) == [2, 2, 1]
    assert row_blocks(0, 16, 40, most=2, multiprocessors=2) == []
