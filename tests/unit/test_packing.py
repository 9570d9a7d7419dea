"""Labels by hand, labels by property, padding, and the way through flat arrays."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laser.batching import FlatBatch, PackInput, flatten, pack
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample

EOS, OTHER_EOS, SCORE = 90, 91, 99


def packed(sequences, score_token_id=SCORE, pad_multiple=1, inv_temperature=1.0):
    return pack(
        sequences, score_token_id=score_token_id, pad_multiple=pad_multiple, inv_temperature=inv_temperature
    )


def test_labels_of_a_micro_batch_written_by_hand():
    result = packed(
        [
            PackInput(7, [1, 2, 3], [11, 12, EOS], scored=True),
            PackInput(4, [4], [13, 14], scored=False),  # truncated: its last row has no label
            PackInput(9, [5, 6], [], scored=False),  # nothing was generated
            PackInput(2, [8, 8], [OTHER_EOS], scored=True),  # the other stop id, at once
        ],
        pad_multiple=8,
        inv_temperature=1.25,
    )
    # index:                          0  1  2   3   4    5  6   7   8  9 10 11 12        13 14 15
    assert result.tokens.tolist() == [1, 2, 3, 11, 12, EOS, 4, 13, 14, 5, 6, 8, 8, OTHER_EOS, 0, 0]
    assert result.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1]
    assert result.cu_seqlens.tolist() == [0, 6, 9, 11, 14, 16]
    assert result.max_seqlen == 6
    rows = [
        # row, label, is score, sample, response position, inverse temperature
        (2, 11, False, 7, 0, 1.25),
        (3, 12, False, 7, 1, 1.25),
        (4, EOS, False, 7, 2, 1.25),
        (5, SCORE, True, 7, 3, 1.0),
        (6, 13, False, 4, 0, 1.25),
        (7, 14, False, 4, 1, 1.25),
        (12, OTHER_EOS, False, 2, 0, 1.25),
        (13, SCORE, True, 2, 1, 1.0),
    ]
    columns = [
        result.row_index,
        result.labels,
        result.is_score,
        result.sample_index,
        result.response_position,
        result.inv_temperature,
    ]
    assert [tuple(row) for row in zip(*(column.tolist() for column in columns))] == rows
    dtypes = [np.int64, np.int64, np.bool_, np.int64, np.int64, np.float32]
    assert [column.dtype for column in columns] == dtypes
    assert result.tokens.dtype == result.position_ids.dtype == np.int64
    assert result.cu_seqlens.dtype == np.int32


def test_without_a_score_token_there_are_no_score_rows():
    result = packed([PackInput(0, [1], [5, EOS], scored=True)], score_token_id=None)
    assert result.labels.tolist() == [5, EOS]
    assert not result.is_score.any()


@st.composite
def micro_batches(draw, min_size=0):
    ids = st.integers(1, 89)
    sequences = []
    for index in draw(st.lists(st.integers(0, 1000), min_size=min_size, max_size=8, unique=True)):
        prompt = draw(st.lists(ids, min_size=1, max_size=6))
        response = draw(st.lists(ids, max_size=8))
        ending = draw(st.sampled_from(["stop", "other stop", "length"]))
        if ending != "length":
            response.append(EOS if ending == "stop" else OTHER_EOS)
        sequences.append(PackInput(index, prompt, response, scored=ending != "length"))
    return sequences


@settings(max_examples=200, deadline=None)
@given(micro_batches(), st.sampled_from([1, 2, 8, 64]), st.booleans())
def test_every_row_is_labelled_with_its_sample_and_position(sequences, pad_multiple, with_score):
    result = packed(sequences, SCORE if with_score else None, pad_multiple, inv_temperature=0.5)
    by_index = {item.sample_index: item for item in sequences}
    wanted = [
        (item.sample_index, t)
        for item in sequences
        for t in range(len(item.response_ids) + (item.scored and with_score))
    ]
    assert list(zip(result.sample_index.tolist(), result.response_position.tolist())) == wanted
    starts = {item.sample_index: int(s) for item, s in zip(sequences, result.cu_seqlens)}
    for row, label, is_score, index, t, inv_temperature in zip(
        result.row_index,
        result.labels,
        result.is_score,
        result.sample_index,
        result.response_position,
        result.inv_temperature,
    ):
        item = by_index[index]
        text = [*item.prompt_ids, *item.response_ids]
        start = starts[index]
        # The row sees the prompt and exactly the t response tokens before its label.
        seen = result.tokens[start : row + 1].tolist()
        assert seen == text[: len(item.prompt_ids) + t]
        assert is_score == (t == len(item.response_ids))
        assert label == (SCORE if is_score else item.response_ids[t])
        assert inv_temperature == (1.0 if is_score else 0.5)
        assert not is_score or result.tokens[row] in (EOS, OTHER_EOS)


@settings(max_examples=100, deadline=None)
@given(micro_batches(min_size=1), st.sampled_from([1, 2, 8, 64]))
def test_sequences_and_padding_tile_the_packed_tokens(sequences, pad_multiple):
    result = packed(sequences, pad_multiple=pad_multiple)
    total = len(result.tokens)
    lengths = np.diff(result.cu_seqlens)
    real = sum(len(item.prompt_ids) + len(item.response_ids) for item in sequences)
    assert total % pad_multiple == 0 and total - real < pad_multiple
    assert len(lengths) == len(sequences) + (total > real) and lengths.min() > 0
    assert result.cu_seqlens[0] == 0 and result.cu_seqlens[-1] == total
    assert result.max_seqlen == lengths.max()
    assert result.position_ids.tolist() == [t for length in lengths for t in range(length)]
    assert (np.diff(result.row_index) > 0).all() and (result.row_index < real).all()


@pytest.mark.parametrize(("pad_multiple", "length"), [(1, 2), (2, 2), (16, 16)])
def test_an_empty_micro_batch_is_one_padding_sequence(pad_multiple, length):
    result = packed([], pad_multiple=pad_multiple)
    assert result.tokens.tolist() == [0] * length
    assert result.cu_seqlens.tolist() == [0, length] and result.max_seqlen == length
    for column in (result.row_index, result.labels, result.is_score, result.inv_temperature):
        assert column.shape == (0,)


def test_arguments_that_cannot_be_packed_are_refused():
    item = PackInput(3, [1], [2], scored=False)
    with pytest.raises(ValueError, match="sample 5 has an empty prompt"):
        packed([item, PackInput(5, [], [2], scored=False)])
    with pytest.raises(ValueError, match="pad_multiple=0"):
        packed([item], pad_multiple=0)
    with pytest.raises(ValueError, match="inv_temperature=inf"):
        packed([item], inv_temperature=math.inf)


def rollout_batch():
    def sample(prompt, response, finish, zc_logprob=None):
        generation = Generation(response, [-0.5 - i for i in range(len(response))], finish, weight_version=3)
        scored = generation.is_scored((EOS, OTHER_EOS))
        return Sample(
            prompt, generation, "text", scored, reward=float(scored), outcome="", zc_logprob=zc_logprob
        )

    groups = [
        Group(
            Prompt(0, "p", "a", [1, 2]),
            [sample([1, 2], [11, EOS], "stop", -21.5), sample([1, 2], [12, 13, 14], "length")],
        ),
        Group(Prompt(1, "q", "b", [3]), [sample([3], [OTHER_EOS], "stop"), sample([3], [], "abort")]),
    ]
    return RolloutBatch(step=12, weight_version=3, groups=groups)


def test_a_rollout_batch_flattens_to_arrays_in_sample_order():
    flat = flatten(rollout_batch())
    assert (flat.step, flat.weight_version, flat.num_samples) == (12, 3, 4)
    assert flat.tokens.tolist() == [1, 2, 11, EOS, 1, 2, 12, 13, 14, 3, OTHER_EOS, 3]
    assert flat.prompt_lengths.tolist() == [2, 2, 1, 1]
    assert flat.response_lengths.tolist() == [2, 3, 1, 0]
    assert flat.lengths.tolist() == [4, 5, 2, 1]
    assert flat.group_ids.tolist() == [0, 0, 1, 1]
    assert flat.rewards.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert flat.scored.tolist() == [True, False, True, False]
    assert flat.rollout_logprobs.tolist() == [-0.5, -1.5, -0.5, -1.5, -2.5, -0.5]
    assert flat.zc_logprobs[0] == -21.5 and np.isnan(flat.zc_logprobs[1:]).all()


def test_flat_arrays_give_the_samples_back():
    batch = rollout_batch()
    flat = FlatBatch.from_arrays(flatten(batch).to_arrays())
    for index, sample in enumerate(batch.samples()):
        item = flat.pack_input(index)
        assert item.sample_index == index and item.scored is sample.scored
        assert item.prompt_ids.tolist() == sample.prompt_ids == flat.prompt_ids(index).tolist()
        assert item.response_ids.tolist() == sample.generation.response_ids.tolist()
        own = slice(*flat.response_offsets[index : index + 2])
        assert flat.rollout_logprobs[own].tolist() == sample.generation.logprobs.tolist()


def test_policy_rows_find_their_rollout_logprob():
    flat = flatten(rollout_batch())
    result = packed([flat.pack_input(i) for i in (1, 0, 3, 2)])
    policy = ~result.is_score
    where = flat.response_offsets[result.sample_index[policy]] + result.response_position[policy]
    assert flat.rollout_logprobs[where].tolist() == [-0.5, -1.5, -2.5, -0.5, -1.5, -0.5]
    assert result.sample_index[result.is_score].tolist() == [0, 2]


def test_arrays_have_fixed_names_and_dtypes_and_are_checked():
    arrays = flatten(rollout_batch()).to_arrays()
    names = {
        name: dtype for name, dtype in FlatBatch.ARRAYS.items() if not name.startswith(("set_", "policy_"))
    }
    assert {name: array.dtype.type for name, array in arrays.items()} == names
    assert arrays["header"].tolist() == [12, 3]
    with pytest.raises(ValueError, match=r"expected .*zc_logprobs"):
        FlatBatch.from_arrays({name: array for name, array in arrays.items() if name != "zc_logprobs"})
    with pytest.raises(ValueError, match="'tokens' is int64"):
        FlatBatch.from_arrays({**arrays, "tokens": arrays["tokens"].astype(np.int64)})
    with pytest.raises(ValueError, match=r"tokens has shape \(11,\): expected \(12,\)"):
        FlatBatch.from_arrays({**arrays, "tokens": arrays["tokens"][1:]})


def test_a_batch_says_which_responses_were_cut_off_and_older_ones_by_their_length():
    batch = rollout_batch()
    lengths = [len(sample.generation.response_ids) for sample in batch.samples()]
    longest = max(lengths)
    for sample in batch.samples():
        sample.scored, sample.generation.finish_reason = False, "length"
        sample.generation.cut_off = len(sample.generation.response_ids) == 1
    arrays = flatten(batch).to_arrays()
    told = FlatBatch.from_arrays(arrays)
    assert told.cut_off(longest).tolist() == [length == 1 for length in lengths]
    older = FlatBatch.from_arrays({k: v for k, v in arrays.items() if k != "truncated"})
    assert older.cut_off(longest).tolist() == [length == longest for length in lengths]
    assert told.cut_off(longest).any() and older.cut_off(longest).any()


def test_an_empty_batch_flattens():
    flat = flatten(RolloutBatch(step=1, weight_version=0))
    assert flat.num_samples == 0 and flat.tokens.shape == (0,)


def test_broken_generations_are_refused_when_flattened():
    batch = rollout_batch()
    batch.groups[0].samples[1].generation.logprobs = np.full(2, -0.5, np.float32)
    with pytest.raises(ValueError, match="sample 1 of step 12 has 3 response ids and 2 log-probs"):
        flatten(batch)
    batch = rollout_batch()
    batch.groups[0].samples[1].prompt_ids = [2**31]
    with pytest.raises(OverflowError):
        flatten(batch)
    with pytest.raises(OverflowError):
        Generation([2**31], [-0.5], "length", 0)
