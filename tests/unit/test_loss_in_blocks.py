"""The training loss in blocks of labelled rows: parts add up to the whole, and a row's gradient is the same in both."""

import itertools

import numpy as np
import pytest
import torch
from helpers.models import save_tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.model import platform

platform.install()

from megatron_laser.trainer.losses import BatchTensors, TrainLoss  # noqa: E402
from megatron_laser.trainer.objective import Objective, ResponseMeans  # noqa: E402
from megatron_laser.trainer.run_readouts import RunReadouts  # noqa: E402
from megatron_laser.trainer.step_data import prepare_step  # noqa: E402
from megatron_laser.trainer.step_metrics import MAX_KEYS  # noqa: E402

# Truncated, empty and one-token responses; one micro-batch.
GROUPS = [
    [Response(5, True), Response(12, False), Response(6, False, truncated=True)],
    [Response(2, False), Response(0, False, truncated=True), Response(9, True), Response(1, False)],
]
PLAIN = {"old_logprobs": "rollout"}
CASES = {
    "clip": (PLAIN, {}),
    "on-policy": ({"old_logprobs": "on_policy"}, {}),
    "dual clip": (PLAIN | {"dual_clip": 1.3}, {}),
    "truncated importance sampling": ({"old_logprobs": "recompute", "importance_cap": 1.1}, {}),
    "masked importance sampling": ({"old_logprobs": "recompute", "importance_mask": [0.8, 1.3]}, {}),
    "both": ({"old_logprobs": "recompute", "importance_cap": 1.1, "importance_mask": [0.6, 1.5]}, {}),
    "k1": (PLAIN | {"kl_coefficient": 0.3, "kl_estimator": "k1"}, {}),
    "k2": (PLAIN | {"kl_coefficient": 0.3, "kl_estimator": "k2"}, {}),
    "k3": (PLAIN | {"kl_coefficient": 0.3, "kl_estimator": "k3"}, {}),
    "entropy": (PLAIN | {"entropy_coefficient": 0.02}, {}),
    "response means": (PLAIN | {"loss_aggregation": "sequence_mean_token_mean"}, {}),
    "cross-entropy": (PLAIN, {"loss": "bce"}),
    "targets": (PLAIN, {"targets": [0.7, -0.4]}),
    "all": (
        {"old_logprobs": "recompute", "dual_clip": 1.3, "importance_cap": 1.1, "importance_mask": [0.6, 1.5]}
        | {"kl_coefficient": 0.3, "entropy_coefficient": 0.02},
        {},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss_in_blocks") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


def case_of(model, tmp_path, policy, laser, *, trained=True):
    """(loss, micro-batch, log-probs [rows], entropies [rows]) with random numbers in float64."""
    config = run_config(tmp_path, model, policy=dict(policy), laser=dict(laser))
    flat = rollout_batch(GROUPS)
    data = prepare_step(flat, config, score_token_id=SCORE_TOKEN, data_rank=0, data_size=1, context_rank=0)
    (minibatch,) = data.minibatches
    (rows,) = minibatch.micro_batches
    random = torch.Generator().manual_seed(1)

    def normal(*shape, spread=1.0):
        return spread * torch.randn(*shape, generator=random, dtype=torch.float64)

    logprobs = normal(len(rows.head.rows)) - 6.0
    policy_logprobs = logprobs[rows.policy_rows]
    rows.rollout_logprobs = policy_logprobs + normal(len(policy_logprobs), spread=0.3)
    if config.policy.old_logprobs == "rollout":
        rows.old_logprobs = rows.rollout_logprobs
    elif config.policy.old_logprobs == "recompute":
        rows.old_logprobs = policy_logprobs + normal(len(policy_logprobs), spread=0.3)
    if config.policy.kl_coefficient:
        rows.reference_logprobs = policy_logprobs + normal(len(policy_logprobs), spread=0.3)
    count, readouts = len(data.rewards), RunReadouts.of(config, SCORE_TOKEN)
    references = readouts.references(data.points, None)
    tensors = BatchTensors(
        normal(count),
        ResponseMeans(torch.from_numpy(flat.response_lengths), None),
        readouts.tensors(flat, data.points, references, torch.device("cpu")),
        normal(count) - 6.0,
    )
    loss = TrainLoss(
        config,
        minibatch,
        tensors,
        Objective(config),
        readouts,
        step=1000 if trained else 0,  # beyond the warm-up
        compares_with_engine=True,
        compares_scores=True,
    )
    return loss, rows, logprobs, normal(len(logprobs)).abs()


def gradients(loss, *inputs):
    """Of a scalar, for tensors of which it may not depend on every one."""
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def cuts(rows):
    """Ways to cut `rows` rows: everywhere once, into single rows, at random."""
    yield from ([first] for first in range(rows + 1))
    yield range(1, rows)
    random = np.random.default_rng(0)
    yield from (sorted(random.choice(rows, 3, replace=False).tolist()) for _ in range(20))


def blocks(rows, cut):
    bounds = [0, *cut, rows]
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]


@pytest.mark.parametrize("case", CASES)
def test_blocks_have_the_losses_and_gradients_of_the_whole(model, tmp_path, case):
    loss, micro_batch, logprobs, entropies = case_of(model, tmp_path, *CASES[case])
    rows = len(logprobs)
    logprobs.requires_grad_()
    entropies.requires_grad_()
    total, _ = loss(micro_batch, torch.stack([logprobs, entropies]))
    whole = gradients(total, logprobs, entropies)
    assert whole[0].count_nonzero() > rows / 4 and whole[0][micro_batch.score_rows].all()
    assert bool(whole[1].any()) == ("entropy_coefficient" in CASES[case][0])
    of_block = loss.row_loss(micro_batch)
    for cut in cuts(rows):
        parts, grads = [], []
        for block in blocks(rows, cut):
            part = logprobs[block].detach().requires_grad_(), entropies[block].detach().requires_grad_()
            parts.append(of_block(*part, block))
            grads.append(gradients(parts[-1], *part))
        torch.testing.assert_close(sum(parts), total, rtol=1e-13, atol=1e-13)
        for ours, expected in zip((torch.cat(one) for one in zip(*grads)), whole):
            assert torch.equal(ours, expected)


def test_clips_are_active_and_importance_weights_differ_from_one(model, tmp_path):
    """What the cases above compare is there to be compared."""
    for case in ("clip", "dual clip", "both"):
        loss, rows, logprobs, entropies = case_of(model, tmp_path, *CASES[case])
        _, sums = loss(rows, torch.stack([logprobs, entropies]))
        assert 0 < sums["clip_fraction"] < sums["policy_rows"]
        if case == "both":
            assert 0 < sums["importance_masked_fraction"] < sums["policy_rows"]


@pytest.mark.parametrize("case", ["all", "clip", "on-policy"])
@pytest.mark.parametrize("trained", [True, False])
def test_every_named_sum_of_blocks_is_that_of_the_whole(model, tmp_path, case, trained):
    loss, micro_batch, logprobs, entropies = case_of(model, tmp_path, *CASES[case], trained=trained)
    output = torch.stack([logprobs, entropies])
    _, whole = loss(micro_batch, output)
    assert ("self_reward_loss" in whole, "self_reward_error" in whole) == (trained, not trained)
    for cut in cuts(len(logprobs)):
        sums = [loss(micro_batch.block(rows), output[:, rows])[1] for rows in blocks(len(logprobs), cut)]
        for name, value in whole.items():
            values = torch.stack([part[name] for part in sums if name in part])
            together = values.max() if name in MAX_KEYS else values.sum()
            torch.testing.assert_close(together, value, rtol=1e-12, atol=1e-12, msg=name)


def test_a_block_knows_its_rows_without_asking_the_device(model, tmp_path):
    _, micro_batch, logprobs, _ = case_of(model, tmp_path, *CASES["all"])
    kinds = torch.zeros(len(logprobs), dtype=torch.int64).index_fill(0, micro_batch.score_rows, 1)
    for cut in cuts(len(logprobs)):
        for rows in blocks(len(logprobs), cut):
            block = micro_batch.block(rows)
            assert torch.equal(block.score_rows, kinds[rows].nonzero()[:, 0])
            assert torch.equal(block.policy_rows, (kinds[rows] == 0).nonzero()[:, 0])
            inner = slice(len(kinds[rows]) // 3, len(kinds[rows]))  # a block of a block
            again, direct = block.block(inner), micro_batch.block(slice(rows.start + inner.start, rows.stop))
            assert torch.equal(again.policy_rows, direct.policy_rows)
            assert torch.equal(again.rollout_logprobs, direct.rollout_logprobs)
            assert torch.equal(again.score_sample, direct.score_sample)
    # A tensor without values refuses to be read.
    micro_batch.policy_rows = micro_batch.policy_rows.to("meta")
    micro_batch.score_rows = micro_batch.score_rows.to("meta")
    block = micro_batch.block(slice(3, 20))
    assert len(block.policy_rows) + len(block.score_rows) == 17


def test_rows_of_the_sequence_parallel_ranks_are_known_from_the_packing(model, tmp_path):
    _, micro_batch, _, _ = case_of(model, tmp_path, *CASES["all"])
    head, tokens = micro_batch.head, micro_batch.tokens.shape[1]
    shard = tokens // 2
    ranges = [head.own_rows(shard, rank) for rank in range(2)]
    for rank, (first, last) in enumerate(ranges):
        assert all(type(bound) is int for bound in (first, last))
        assert (head.rows[first:last] // shard == rank).all()
    assert ranges[0][0] == 0 and ranges[0][1] == ranges[1][0] and ranges[1][1] == len(head.rows)
    assert 0 < ranges[0][1] < len(head.rows)
    assert micro_batch.only_scores().own_rows(shard, 0) is None
