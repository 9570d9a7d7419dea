"""How a rollout batch becomes one rank's micro-batches, and the counts that make the loss independent of the cut."""

import numpy as np
import pytest
import torch
from helpers.models import save_tiny_model
from helpers.rollouts import STOP, Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.model import platform

platform.install()

from megatron_laser.trainer.step_data import (  # noqa: E402
    make_micro_batch,
    pad_multiple,
    prepare_step,
)
from megatron_laser.trainer.step_metrics import MAX_KEYS, SUM_KEYS, reduce_sums  # noqa: E402

GROUPS = [
    [Response(5, True), Response(12, False), Response(20, False, truncated=True)],
    [Response(2, False), Response(9, False), Response(14, True), Response(6, False)],
    [Response(4, True), Response(1, False)],
    [Response(16, False, truncated=True), Response(7, False)],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step_data") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


def prepare(model, tmp_path, flat, *overrides, ranks=1, score_token_id=SCORE_TOKEN):
    config = run_config(tmp_path, model, "batching.tokens_per_micro_batch=128", *overrides)
    return [
        prepare_step(
            flat, config, score_token_id=score_token_id, data_rank=rank, data_size=ranks, context_rank=0
        )
        for rank in range(ranks)
    ]


def samples_of(micro_batch):
    return set(micro_batch.policy_sample.tolist())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_every_sample_is_trained_on_once_by_one_rank_in_its_minibatch(model, tmp_path, ranks, minibatches):
    flat = rollout_batch(GROUPS)
    data = prepare(model, tmp_path, flat, f"policy.minibatches={minibatches}", ranks=ranks)
    for m in range(minibatches):
        seen = [s for one in data for batch in one.minibatches[m].micro_batches for s in samples_of(batch)]
        assert len(seen) == len(set(seen)) == data[0].minibatches[m].num_samples
        assert len({len(one.minibatches[m].micro_batches) for one in data}) == 1
    everything = [s for one in data for batch in one.micro_batches for s in samples_of(batch)]
    assert sorted(everything) == list(range(flat.num_samples))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_counts_are_those_of_the_global_minibatch_on_every_rank(model, tmp_path, minibatches):
    flat = rollout_batch(GROUPS)
    data = prepare(model, tmp_path, flat, f"policy.minibatches={minibatches}", ranks=3)
    bounds = {1: [(0, 4)], 2: [(0, 2), (2, 4)]}[minibatches]
    for m, (first, last) in enumerate(bounds):
        chosen = [response for group in GROUPS[first:last] for response in group]
        scored = [response for response in chosen if not response.truncated]
        right = sum(response.right for response in scored)
        for one in data:
            minibatch = one.minibatches[m]
            assert minibatch.num_samples == len(chosen)
            assert minibatch.num_tokens == sum(response.length for response in chosen)
            assert minibatch.point_counts == (len(scored),)
            weights = (len(scored) / (2 * right), len(scored) / (2 * (len(scored) - right)))
            assert minibatch.class_weights == (weights,)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean"])
def test_row_weights_of_all_ranks_sum_to_one_in_each_minibatch(model, tmp_path, aggregation):
    overrides = ("policy.minibatches=2", f"policy.loss_aggregation={aggregation}")
    data = prepare(model, tmp_path, rollout_batch(GROUPS), *overrides, ranks=2)
    for m in range(2):
        minibatches = [one.minibatches[m] for one in data]
        rows = [b.token_weights[mb.policy_sample].sum() for b in minibatches for mb in b.micro_batches]
        assert float(sum(rows)) == pytest.approx(1.0, rel=1e-6)


def test_class_weights_can_be_turned_off(model, tmp_path):
    (data,) = prepare(model, tmp_path, rollout_batch(GROUPS), "laser.class_weights=false")
    assert data.minibatches[0].class_weights == ((1.0, 1.0),)


def test_a_rank_without_samples_still_runs_a_micro_batch_of_padding(model, tmp_path):
    flat = rollout_batch([[Response(3, True), Response(4, False)]])
    data = prepare(model, tmp_path, flat, ranks=4)
    idle = [one for one in data if not any(samples_of(batch) for batch in one.micro_batches)]
    assert len(idle) == 2
    for one in idle:
        (batch,) = one.micro_batches
        assert batch.tokens.shape[1] >= 2
        assert len(batch.head.rows) == len(batch.policy_rows) == len(batch.score_rows) == 0
        assert one.minibatches[0].num_samples == 2


@pytest.mark.parametrize(
    ("overrides", "multiple"),
    [
        ((), 2),
        (("parallel.tensor=4",), 2),
        (("parallel.tensor=4", "parallel.sequence=true"), 4),
        (("parallel.tensor=2", "parallel.sequence=true"), 2),
        (("batching.pad_multiple=48",), 48),
        (("batching.pad_multiple=8", "parallel.tensor=4", "parallel.sequence=true"), 8),
    ],
)
def test_packed_lengths_divide_over_the_sequence_parallel_ranks(model, tmp_path, overrides, multiple):
    (data,) = prepare(model, tmp_path, rollout_batch(GROUPS), *overrides)
    for batch in data.micro_batches:
        tokens = batch.tokens.shape[1]
        assert tokens % multiple == 0
        assert batch.packed.cu_seqlens_q[-1] == tokens
        assert batch.packed.max_seqlen_q == int((batch.packed.cu_seqlens_q.diff()).max())


@pytest.mark.parametrize(
    ("overrides", "cuda", "expected"),
    [
        ((), True, 128),
        (("parallel.tensor=4",), True, 512),
        (("parallel.tensor=4", "parallel.sequence=true"), True, 512),
        (("batching.pad_multiple=2",), True, 2),
        ((), False, 2),
        (("parallel.tensor=4", "parallel.sequence=true"), False, 4),
    ],
)
def test_lengths_are_rounded_to_few_values_on_cuda_only(
    model, tmp_path, monkeypatch, overrides, cuda, expected
):
    monkeypatch.setattr(platform, "has_cuda", lambda: cuda)
    assert pad_multiple(run_config(tmp_path, model, *overrides)) == expected


def test_interleaved_pipelines_get_whole_rounds_of_micro_batches(model, tmp_path):
    overrides = ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "policy.minibatches=4")
    (data,) = prepare(model, tmp_path, rollout_batch(GROUPS), *overrides)
    assert all(len(minibatch.micro_batches) % 2 == 0 for minibatch in data.minibatches)


def test_each_policy_row_carries_the_rollout_logprob_of_its_own_token(model, tmp_path):
    flat = rollout_batch(GROUPS)
    for one in prepare(model, tmp_path, flat, ranks=2):
        for batch in one.micro_batches:
            for row, sample, logprob in zip(
                batch.policy_rows.tolist(), batch.policy_sample.tolist(), batch.rollout_logprobs.tolist()
            ):
                position = int(batch.head.rows[row])
                start = int(batch.packed.cu_seqlens_q[batch.packed.cu_seqlens_q <= position][-1])
                t = position - start - int(flat.prompt_lengths[sample]) + 1
                assert int(batch.head.labels[row]) == flat.response_ids(sample)[t]
                assert logprob == flat.rollout_logprobs[flat.response_offsets[sample] + t]


def test_scored_responses_have_one_score_row_on_their_stop_token_at_temperature_one(model, tmp_path):
    flat = rollout_batch(GROUPS)
    (data,) = prepare(model, tmp_path, flat, "rollout.temperature=0.5")
    scored = []
    for batch in data.micro_batches:
        rows = batch.score_rows
        scored += batch.score_sample.tolist()
        assert (batch.tokens[0, batch.head.rows[rows]] == STOP).all()
        assert (batch.head.labels[rows] == SCORE_TOKEN).all()
        assert (batch.head.inv_temperature[rows] == 1.0).all()
        assert (batch.head.inv_temperature[batch.policy_rows] == 2.0).all()
        only = batch.only_scores()
        assert torch.equal(only.rows, batch.head.rows[rows]) and only.few_rows and not only.with_entropy
        assert batch.head.with_entropy and not batch.without_entropy().with_entropy
    assert sorted(scored) == np.flatnonzero(flat.scored).tolist()


def test_without_a_score_token_there_are_no_score_rows(model, tmp_path):
    (data,) = prepare(model, tmp_path, rollout_batch(GROUPS), score_token_id=None)
    assert all(len(batch.score_rows) == 0 for batch in data.micro_batches)
    assert data.minibatches[0].point_counts == ()


def test_an_empty_micro_batch_has_no_labels():
    batch = make_micro_batch(
        rollout_batch(GROUPS), [], score_token_id=SCORE_TOKEN, temperature=1.0, pad_multiple=4
    )
    assert batch.tokens.shape == (1, 4)
    assert batch.head.rows.numel() == batch.rollout_logprobs.numel() == 0


def entry(**values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_sums_are_added_and_maxima_are_kept_over_micro_batches():
    entries = [
        entry(policy_loss=1.5, max_mismatch=3.0),
        entry(policy_loss=-0.5, kl_loss=2.0, max_mismatch=1.0),
    ]
    totals = reduce_sums(entries, contributes=True, group=None)
    assert totals["policy_loss"] == 1.0 and totals["kl_loss"] == 2.0 and totals["max_mismatch"] == 3.0
    assert set(totals) == set(SUM_KEYS) | set(MAX_KEYS)
    silent = reduce_sums(entries, contributes=False, group=None)
    assert not any(silent.values())


def test_a_sum_that_no_rank_expects_is_refused():
    with pytest.raises(KeyError, match="surprise"):
        reduce_sums([entry(surprise=1.0)], contributes=True, group=None)


@pytest.mark.parametrize("context", [2, 3])
def test_context_ranks_share_the_rows_of_the_same_micro_batches(model, tmp_path, context):
    flat = rollout_batch(GROUPS)
    (alone,) = prepare(model, tmp_path, flat, f"batching.tokens_per_micro_batch={128 * context}")
    config = run_config(tmp_path, model, "batching.tokens_per_micro_batch=128", f"parallel.context={context}")
    parts = [
        prepare_step(flat, config, score_token_id=SCORE_TOKEN, data_rank=0, data_size=1, context_rank=rank)
        for rank in range(context)
    ]
    assert len({len(part.micro_batches) for part in (alone, *parts)}) == 1
    for whole, *shares in zip(alone.micro_batches, *(part.micro_batches for part in parts), strict=True):
        assert all(
            share.tokens.shape[1] <= 128 for share in shares
        )  # the budget is of one rank, padding included
        assert len({share.tokens.shape for share in shares}) == 1
        for name in ("policy_sample", "score_sample", "rollout_logprobs"):
            together = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(together.sort().values, getattr(whole, name).sort().values)
        for share in shares:
            assert share.head.positions.tolist() == share.head.rows.tolist()
            rows = sorted([*share.policy_rows.tolist(), *share.score_rows.tolist()])
            assert rows == list(range(len(share.head.rows)))
            assert len(share.rollout_logprobs) == share.policy_counts[-1] == len(share.policy_rows)
            assert set(share.head.labels[share.score_rows].tolist()) <= {SCORE_TOKEN}
            assert share.packed.max_seqlen_q == int(share.packed.cu_seqlens_q.diff().max())
            assert int(share.packed.cu_seqlens_q[-1]) == context * share.tokens.shape[1]
    for whole, *shares in zip(alone.minibatches, *(part.minibatches for part in parts), strict=True):
        for share in shares:
            assert (share.num_samples, share.num_tokens, share.point_counts, share.class_weights) == (
                whole.num_samples,
                whole.num_tokens,
                whole.point_counts,
                whole.class_weights,
            )
            assert torch.equal(share.token_weights, whole.token_weights)


@pytest.mark.parametrize("context", [2, 4])
def test_the_budget_of_a_rank_holds_with_the_padding_for_context_ranks(model, tmp_path, context):
    budget = 128 // context  # the longest sequence that is possible has 128 tokens
    flat = rollout_batch([[Response(length, True)] * 14 for length in (4, 5)])
    data = prepare(
        model, tmp_path, flat, f"batching.tokens_per_micro_batch={budget}", f"parallel.context={context}"
    )
    sizes = [batch.tokens.shape[1] for batch in data[0].micro_batches]
    assert len(sizes) > 1 and max(sizes) <= budget
