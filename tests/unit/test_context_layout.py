"""The zig-zag layout of context parallelism: written by hand, and by property for 1 to 8 ranks and 1 to 4096 tokens."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laser.batching import PackInput, context_shard, pack
from megatron_laser.batching.context import context_positions, packed_order, sequence_positions

EOS, SCORE = 90, 99
ROW_FIELDS = ("labels", "is_score", "sample_index", "response_position", "inv_temperature")


def packed(sequences, size, *, score_token_id=SCORE, blocks=1):
    return pack(
        sequences,
        score_token_id=score_token_id,
        pad_multiple=2 * size * blocks,
        inv_temperature=1.25,
        context_size=size,
    )


def shards(whole, size):
    return [context_shard(whole, size=size, rank=rank) for rank in range(size)]


def test_two_ranks_written_by_hand():
    whole = packed(
        [PackInput(7, [1, 2, 3], [11, 12, EOS], True), PackInput(4, [4], [13, 14], False)], 2, blocks=4
    )
    # index:                         0  1  2   3   4    5  6  7  8   9  10 11 12 13 14 15
    assert whole.tokens.tolist() == [1, 2, 3, 11, 12, EOS, 0, 0, 4, 13, 14, 0, 0, 0, 0, 0]
    assert whole.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2, 3]
    assert whole.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert whole.max_seqlen == 8
    assert whole.row_index.tolist() == [2, 3, 4, 5, 8, 9]
    assert whole.labels.tolist() == [11, 12, EOS, SCORE, 13, 14]
    first, second = shards(whole, 2)
    # chunks 0 and 3 of each sequence, then 1 and 2
    assert first.tokens.tolist() == [1, 2, 0, 0, 4, 0, 0, 0]
    assert first.position_ids.tolist() == [0, 1, 6, 7, 0, 3, 0, 3]
    assert second.tokens.tolist() == [3, 11, 12, EOS, 13, 14, 0, 0]
    assert second.position_ids.tolist() == [2, 3, 4, 5, 1, 2, 1, 2]
    assert list(zip(first.row_index, first.labels)) == [(4, 13)]
    assert list(zip(second.row_index, second.labels)) == [(0, 11), (1, 12), (2, EOS), (3, SCORE), (4, 14)]
    assert first.sample_index.tolist() == [4]
    assert second.is_score.tolist() == [False, False, False, True, False]
    for shard in (first, second):
        assert shard.cu_seqlens is whole.cu_seqlens
        assert shard.max_seqlen == 8


@st.composite
def micro_batches(draw):
    """Up to six samples, of 1 to 4096 tokens in total each; prompts of one token and empty responses included."""
    sequences = []
    for index in range(draw(st.integers(0, 6))):
        length = draw(st.one_of(st.integers(1, 40), st.integers(1, 4096)))
        prompt = draw(st.integers(1, length))
        scored = draw(st.booleans())
        ids = np.arange(length) % 89 + 1
        sequences.append(PackInput(index, ids[:prompt], ids[prompt:], scored))
    return sequences


@settings(max_examples=150, deadline=None)
@given(
    sequences=micro_batches(),
    size=st.integers(1, 8),
    blocks=st.sampled_from([1, 3, 16]),
    score=st.sampled_from([None, SCORE]),
)
def test_shards_are_the_whole_each_token_and_each_labelled_row_once(sequences, size, blocks, score):
    whole = packed(sequences, size, score_token_id=score, blocks=blocks)
    parts = shards(whole, size)
    share = len(whole.tokens) // size
    assert all(len(part.tokens) == share for part in parts)
    # The round trip: the ranks' tokens one after the other, in packed order again.
    order = packed_order(whole.cu_seqlens, size=size)
    for name in ("tokens", "position_ids"):
        assert np.array_equal(
            np.concatenate([getattr(part, name) for part in parts])[order], getattr(whole, name)
        )
    places = [sequence_positions(whole.cu_seqlens, size=size, rank=rank) for rank in range(size)]
    assert np.array_equal(np.concatenate(places)[order], whole.position_ids)
    # Rows: the packed position of each is found once, in order on each rank, with all that belongs to it.
    positions = [context_positions(whole.cu_seqlens, size=size, rank=rank) for rank in range(size)]
    rows = [own[part.row_index] for own, part in zip(positions, parts)]
    for part in parts:
        assert (np.diff(part.row_index) > 0).all()
    everyone = np.concatenate(rows)
    back = np.argsort(everyone)
    assert np.array_equal(everyone[back], whole.row_index)
    for name in ROW_FIELDS:
        column = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(column[back], getattr(whole, name)), name
        assert column.dtype == getattr(whole, name).dtype


@settings(max_examples=150, deadline=None)
@given(sequences=micro_batches(), size=st.integers(1, 8))
def test_padding_changes_no_label_no_place_and_no_order_of_the_samples_own_tokens(sequences, size):
    plain = pack(sequences, score_token_id=SCORE, pad_multiple=1, inv_temperature=1.25)
    whole = packed(sequences, size)
    for name in ROW_FIELDS:
        assert np.array_equal(getattr(whole, name), getattr(plain, name)), name
    lengths = [len(item.prompt_ids) + len(item.response_ids) for item in sequences]
    starts, plain_starts = whole.cu_seqlens, plain.cu_seqlens
    for index, length in enumerate(lengths):
        mine = slice(starts[index], starts[index] + length)
        theirs = slice(plain_starts[index], plain_starts[index] + length)
        assert np.array_equal(whole.tokens[mine], plain.tokens[theirs])
        assert np.array_equal(whole.position_ids[mine], plain.position_ids[theirs])
        padded = starts[index + 1] - starts[index]
        assert padded % (2 * size if size > 1 else 1) == 0
        assert padded - length < (2 * size if size > 1 else 1)
    # Row by row: the same token of the same sample.
    assert np.array_equal(whole.tokens[whole.row_index], plain.tokens[plain.row_index])
    assert np.array_equal(whole.position_ids[whole.row_index], plain.position_ids[plain.row_index])


@settings(max_examples=100, deadline=None)
@given(
    chunks=st.lists(st.integers(0, 64), min_size=1, max_size=6).filter(any),
    size=st.integers(2, 8),
    data=st.data(),
)
def test_every_rank_has_the_same_causal_work(chunks, size, data):
    bounds = np.concatenate(([0], np.cumsum([2 * size * chunk for chunk in chunks])))
    keys = [sequence_positions(bounds, size=size, rank=rank).sum() for rank in range(size)]
    assert len(set(keys)) == 1
    rank = data.draw(st.integers(0, size - 1))
    positions = context_positions(bounds, size=size, rank=rank)
    assert positions.dtype == np.int64
    assert (np.diff(positions) > 0).all()


def test_a_micro_batch_without_samples_is_padding_on_every_rank():
    parts = shards(packed([], 4), 4)
    assert [part.tokens.tolist() for part in parts] == [[0, 0]] * 4
    assert all(len(part.row_index) == 0 for part in parts)


def test_one_rank_has_the_micro_batch_itself():
    whole = packed([PackInput(0, [1, 2], [3, EOS], True)], 1)
    assert context_shard(whole, size=1, rank=0) is whole
    assert {field.name for field in fields(whole)} >= set(ROW_FIELDS)


@pytest.mark.parametrize(("size", "rank"), [(2, 2), (2, -1), (1, 1)])
def test_a_rank_that_is_not_there_is_refused(size, rank):
    with pytest.raises(ValueError, match=rf"context rank {rank} of {size}"):
        context_positions(np.array([0, 8]), size=size, rank=rank)
    with pytest.raises(ValueError, match=rf"context rank {rank} of {size}"):
        context_shard(packed([], 2), size=size, rank=rank)


def test_sequences_that_were_not_padded_for_it_are_refused_by_number_and_length():
    with pytest.raises(
        ValueError, match=r"packed sequence 1 has 6 tokens: expected a multiple of 2 x 2 context"
    ):
        context_positions(np.array([0, 8, 14]), size=2, rank=0)


@pytest.mark.parametrize(
    ("pad_multiple", "size", "text"),
    [(6, 2, "multiple of 4 for context_size 2"), (0, 1, "at least 1"), (8, 0, "context_size=0")],
)
def test_a_padding_that_the_ranks_cannot_share_is_refused(pad_multiple, size, text):
    with pytest.raises(ValueError, match=text):
        pack([], score_token_id=None, pad_multiple=pad_multiple, inv_temperature=1.0, context_size=size)
