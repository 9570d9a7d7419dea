"""A text behind responses that were cut off, as it is packed: rows, context ranks, sampled sets and routers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.cut_off import CUT, GROUPS, IDS
from helpers.rollouts import Response, rollout_batch

from megatron_laser.model import platform

platform.install()

from megatron_laser.batching.context import context_shard  # noqa: E402
from megatron_laser.batching.packing import pack  # noqa: E402
from megatron_laser.batching.readout_points import at_end, behind_forced, every, readout_points  # noqa: E402
from megatron_laser.trainer.expert_routing import Experts  # noqa: E402
from megatron_laser.trainer.row_sets import row_sets  # noqa: E402
from megatron_laser.types import TokenSets  # noqa: E402


def points_of(flat, continuation=IDS):
    places = [at_end, every(4), behind_forced(len(continuation))]
    return readout_points(flat, places, [(80,), (81,), (82, 83)], continuation)


def inputs(flat, samples):
    points = points_of(flat)
    return [replace(flat.pack_input(i), marks=points.marks(i), appended=points.appended(i)) for i in samples]


def test_points_stand_behind_the_text_of_responses_that_were_cut_off():
    flat = rollout_batch(GROUPS)
    points = points_of(flat)
    own = points.of(2)
    assert points.sample[own].tolist() == CUT
    assert points.offset[own].tolist() == [9 + 3, 7 + 3, 8 + 3]
    assert points.appended_tokens.tolist() == [0, 3, 3, 0, 0, 3]
    assert points.appended(0).tolist() == [] and points.appended(1).tolist() == IDS
    # nor is one that an environment ended, without an end token, cut off
    by_environment = points_of(replace(flat, truncated=np.arange(flat.num_samples) == CUT[0]))
    assert by_environment.sample[by_environment.of(2)].tolist() == CUT[:1]
    # without such a readout nothing is appended
    assert not readout_points(flat, [at_end], [(80,)]).appended_tokens.any()


@pytest.mark.parametrize("share_prompts", [False, True])
def test_what_is_packed_of_a_response_that_was_cut_off_by_hand(share_prompts):
    flat = rollout_batch(
        [[Response(3, True), Response(4, False, truncated=True)]], prompt_lengths=[2], seed=5
    )
    (p, q), cut, done = (
        flat.prompt_ids(0).tolist(),
        flat.response_ids(1).tolist(),
        flat.response_ids(0).tolist(),
    )
    packed = pack(
        inputs(flat, [1, 0]),
        score_token_id=None,
        pad_multiple=1,
        inv_temperature=1.25,
        share_prompts=share_prompts,
    )
    if share_prompts:
        assert packed.tokens.tolist() == [p, q, *cut, *IDS, q, *done]
        assert packed.cu_seqlens.tolist() == [0, 1, 9, 13]
        first, second = 1, 9  # the prompt's last token
    else:
        assert packed.tokens.tolist() == [p, q, *cut, *IDS, p, q, *done]
        assert packed.cu_seqlens.tolist() == [0, 9, 14]
        first, second = 1, 10
    # response tokens are predicted, the text is not; (82, 83) are read behind its last token, 80 behind EOS
    rows = [(first + i, cut[i], -1) for i in range(4)]
    rows += [(first + 4 + 3, 82, 1), (first + 4 + 3, 83, 2)]
    rows += [(second + i, done[i], -1) for i in range(3)] + [(second + 3, 80, 0)]
    assert list(zip(packed.row_index, packed.labels, packed.slot, strict=True)) == rows
    assert packed.position_ids[first + 7] == 1 + 7
    assert set(packed.inv_temperature[packed.is_score]) == {np.float32(1.0)}


def test_context_ranks_have_each_row_behind_the_text_once():
    flat = rollout_batch(GROUPS)
    samples = list(range(flat.num_samples))
    settings = dict(score_token_id=None, inv_temperature=1.25)
    plain = pack(inputs(flat, samples), pad_multiple=1, **settings)
    packed = pack(inputs(flat, samples), pad_multiple=4, context_size=2, **settings)
    shards = [context_shard(packed, size=2, rank=rank) for rank in range(2)]
    found = sorted(
        (int(s), int(t)) for one in shards for s, t in zip(one.slot, one.labels, strict=True) if s >= 0
    )
    assert found == sorted((int(s), int(t)) for s, t in zip(plain.slot, plain.labels, strict=True) if s >= 0)
    for one in shards:  # what stands before a row behind the text is the text's last token
        behind = np.isin(one.labels, [82, 83]) & one.is_score
        assert (one.tokens[one.row_index[behind]] == IDS[-1]).all()


def test_sets_of_sampled_tokens_are_found_beside_rows_behind_the_text():
    """The last sample's rows lie behind all of the batch's tokens."""
    flat = rollout_batch(GROUPS)
    ids = flat.tokens[
        np.concatenate([np.arange(e - n, e) for e, n in zip(np.cumsum(flat.lengths), flat.response_lengths)])
    ]
    sets = TokenSets.join([TokenSets(np.array([2], np.int32), np.array([i, 0], np.int32)) for i in ids])
    flat = replace(flat, set_counts=sets.counts, set_ids=sets.ids)
    packed = pack(inputs(flat, [5, 1]), score_token_id=None, pad_multiple=1, inv_temperature=1.0)
    found = row_sets(flat, packed, torch.device("cpu"))
    assert found.rows.tolist() == np.flatnonzero(~packed.is_score).tolist()
    assert found.sets.ids.tolist() == [i for label in packed.labels[found.rows] for i in (label, 0)]


def test_routers_neither_count_nor_replay_the_text():
    flat = rollout_batch(GROUPS)
    routed = flat.lengths.astype(np.int32) - 1
    experts = np.arange(int(routed.sum()) * 2, dtype=np.int64).reshape(-1, 2) % 8
    flat = replace(flat, routed_tokens=routed, routed_experts=experts.astype(np.uint8))
    packed = pack(inputs(flat, [1, 0]), score_token_id=None, pad_multiple=1, inv_temperature=1.0)
    shape = SimpleNamespace(num_experts=8, experts_per_token=2)
    routing = Experts(shape, 1, (0,)).routing(flat, [1, 0], packed.cu_seqlens, replay=True)
    one, other = int(flat.lengths[1]), int(flat.lengths[0])
    assert routing.real.tolist() == [True] * one + [False] * 3 + [True] * other
    assert routing.known.tolist() == [True] * (one - 1) + [False] * 4 + [True] * (other - 1) + [False]
    first = int(flat.routed_offsets[1])
    assert routing.chosen[: one - 1].tolist() == experts[first : first + one - 1].tolist()
    assert routing.chosen[one + 3 : -1].tolist() == experts[: other - 1].tolist()
