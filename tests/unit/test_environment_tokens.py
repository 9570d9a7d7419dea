"""Tokens that an environment wrote are read and not learned from: rows, counts, loss and gradients."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.models import save_tiny_model, tiny_model
from helpers.plain_training import AT_ONCE, LASER, OPTIMIZER, TOKEN_MEANS, Plain, PlainTrainer
from helpers.rollouts import STEPS, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.batching import FlatBatch, PackInput, flatten, pack
from megatron_laser.batching.context import context_shard
from megatron_laser.model import platform
from megatron_laser.rollout.pending import generation_from, generation_state
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample, WeightSpan

platform.install()

from megatron_laser.trainer.trainer import Trainer  # noqa: E402

EOS, SCORE = 90, 99


def mask(text):
    """`s`: sampled, `e`: by the environment."""
    return np.array([letter == "s" for letter in text])


def packed(sequences, **settings):
    return pack(sequences, score_token_id=SCORE, pad_multiple=1, inv_temperature=1.25, **settings)


def rows_of(result):
    columns = (
        result.row_index,
        result.labels,
        result.is_score,
        result.sample_index,
        result.response_position,
    )
    return list(zip(*(column.tolist() for column in columns)))


def test_no_row_predicts_a_token_of_the_environment():
    result = packed(
        [
            PackInput(7, [1, 2], [11, 12, 13, 14, EOS], scored=True, sampled=mask("seess")),
            PackInput(4, [3], [15, 16], scored=False),
            PackInput(5, [3], [17, 18, 19], scored=False, sampled=mask("ese")),
        ]
    )
    # index:                          0  1  2   3   4   5   6    7  8   9   10 11 12  13
    assert result.tokens.tolist() == [1, 2, 11, 12, 13, 14, EOS, 3, 15, 16, 3, 17, 18, 19]
    assert rows_of(result) == [
        # row, label, is score, sample, response position
        (1, 11, False, 7, 0),
        (4, 14, False, 7, 3),  # what stands before it the environment wrote, and is read
        (5, EOS, False, 7, 4),
        (6, SCORE, True, 7, 5),
        (7, 15, False, 4, 0),
        (8, 16, False, 4, 1),
        (11, 18, False, 5, 1),
    ]
    assert result.inv_temperature.tolist() == [1.25, 1.25, 1.25, 1.0, 1.25, 1.25, 1.25]


@pytest.mark.parametrize("shares", [{"share_prompts": True}, {"context_size": 2}], ids=str)
def test_masks_take_rows_and_nothing_else(shares):
    """Whatever else is done to the micro-batch: what is left are the rows of an unmasked one, without some."""
    texts = ["seesses", "s", "essse", "sssss"]
    samples = [
        PackInput(n, [5, 6, 7], list(range(20, 20 + len(text))), True, group=n // 2, sampled=mask(text))
        for n, text in enumerate(texts)
    ]
    whole = [dataclasses.replace(sample, sampled=None) for sample in samples]
    settings = dict(score_token_id=SCORE, pad_multiple=4, inv_temperature=1.0, **shares)
    some, every = pack(samples, **settings), pack(whole, **settings)
    expected = [row for row in rows_of(every) if row[2] or texts[row[3]][row[4]] == "s"]
    assert rows_of(some) == expected and len(expected) < len(rows_of(every))
    for name in ("tokens", "position_ids", "cu_seqlens"):
        assert np.array_equal(getattr(some, name), getattr(every, name))
    size = shares.get("context_size", 1)
    shards = [context_shard(some, size=size, rank=rank) for rank in range(size)]
    found = sorted((row[3], row[4], row[1]) for shard in shards for row in rows_of(shard))
    assert found == sorted((row[3], row[4], row[1]) for row in expected)


def batch(*masks):
    group = Group(Prompt(0, "", "", [1, 2]), [])
    for text in masks:
        ids = list(range(10, 10 + len(text.replace("-", ""))))
        sampled = None if text.startswith("-") else mask(text)
        generation = Generation(ids, [-0.5] * len(ids), "length", 0, sampled=sampled)
        group.samples.append(Sample([1, 2], generation, "", False, 1.0, "correct"))
    return RolloutBatch(1, 0, [group])


def test_a_batch_carries_masks_and_one_without_them_has_the_bytes_that_it_had():
    flat = flatten(batch("sees", "-ss", "es"))
    assert flat.sampled.tolist() == [True, False, False, True, True, True, False, True]
    assert flat.sampled_lengths.tolist() == [2, 2, 1]
    again = FlatBatch.from_arrays(flat.to_arrays())
    assert again.sampled.tolist() == flat.sampled.tolist() and again.sampled.dtype == np.bool_
    assert again.pack_input(0).sampled.tolist() == [True, False, False, True]

    plain, other = flatten(batch("-ssss", "-ss", "-ss")), flatten(batch("sees", "-ss", "es"))
    arrays = plain.to_arrays()
    assert len(arrays.pop("sampled")) == 0
    assert plain.pack_input(0).sampled is None and plain.sampled_lengths is plain.response_lengths
    for name, array in arrays.items():  # a mask is an array of its own
        assert array.tobytes() == other.to_arrays()[name].tobytes(), name
    kept_before = FlatBatch.from_arrays(arrays)  # of a version without masks
    assert len(kept_before.sampled) == 0


def test_a_mask_of_another_length_is_refused():
    wrong = batch("sees")
    wrong.groups[0].samples[0].generation.sampled = mask("see")
    with pytest.raises(ValueError, match="4 response ids and a mask `sampled` of 3"):
        flatten(wrong)


def test_a_mask_goes_through_a_checkpoint():
    spans = (WeightSpan(3, 2),)
    generation = Generation([5, 6, 7], [-1.0, 0.0, -2.0], "length", 3, spans=spans, sampled=mask("ses"))
    state = generation_state(generation)
    assert generation_from(state) == generation
    assert generation_from(state).sampled.tolist() == [True, False, True]
    del state["sampled"]  # of an older version
    assert generation_from(state).sampled is None and generation_from(state) != generation
    assert generation.policy_logprobs.tolist() == [-1.0, -2.0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment_tokens") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


def masked_batch():
    """Of every response of four tokens and more some stretches are the environment's, and their log-probs nonsense."""
    flat = rollout_batch(STEPS[0], seed=4)
    sampled = np.ones(len(flat.rollout_logprobs), dtype=np.bool_)
    for start, length in zip(flat.response_offsets[:-1], flat.response_lengths):
        for t in range(length - 1):
            sampled[start + t] = length < 4 or t % 5 not in (1, 2)
    logprobs = np.where(sampled, flat.rollout_logprobs, np.float32(0.0))
    return dataclasses.replace(flat, sampled=sampled, rollout_logprobs=logprobs)


@pytest.mark.parametrize(
    "aggregation",
    ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"],
)
def test_an_update_equals_a_plain_computation_over_the_sampled_tokens(
    single_process, model, tmp_path, aggregation
):
    policy = {"old_logprobs": "rollout", "entropy_coefficient": 0.02, "loss_aggregation": aggregation}
    trainer = Trainer(
        run_config(tmp_path, model, laser=LASER | AT_ONCE, optimizer=OPTIMIZER, policy=policy),
        single_process,
        score_token_id=SCORE_TOKEN,
    )
    plain = PlainTrainer(tiny_model("qwen2"), Plain(temperature=1.0, **OPTIMIZER, **LASER, **policy))
    flat = masked_batch()
    assert 0 < int((~flat.sampled).sum()) < len(flat.sampled)
    expected = plain.step(flat, with_loss=True, with_mixing=True)
    metrics = trainer.train_step(flat, 1).metrics
    for name in ("policy_loss", "self_reward_loss", "grad_norm", *TOKEN_MEANS):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    # The mismatch is of the sampled tokens alone: the others' log-probs, 0, are far from any model's.
    with torch.no_grad():
        initial = tiny_model("qwen2")
        own = [plain.logprobs(initial, flat, i)[0] for i in range(flat.num_samples)]
    difference = (torch.cat(own) - torch.from_numpy(flat.rollout_logprobs[flat.sampled]).double()).abs()
    assert metrics["logprob_diff_mean"] == pytest.approx(float(difference.mean()), rel=1e-4)
    trained = dict(trainer.weight_stream())
    for name, parameter in plain.model.named_parameters():
        assert (trained[name] - parameter).abs().max() < 2e-6, name


def test_an_update_does_not_depend_on_the_micro_batches_nor_on_shared_prompts(
    single_process, model, tmp_path
):
    weights, counts = [], []
    for number, settings in enumerate(
        (
            ["batching.tokens_per_micro_batch=4096", "batching.share_prompts=false"],
            ["batching.tokens_per_micro_batch=128", "batching.share_prompts=false"],
            ["batching.tokens_per_micro_batch=4096", "batching.share_prompts=true"],
        )
    ):
        config = run_config(
            tmp_path / str(number), model, *settings, laser=LASER | AT_ONCE, data={"max_prompt_tokens": 16}
        )
        trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
        counts.append(trainer.train_step(masked_batch(), 1).metrics["micro_batches"])
        weights.append({name: tensor.clone() for name, tensor in trainer.weight_stream()})
    assert counts[1] > counts[0]
    for other in weights[1:]:
        assert all((other[name] - weights[0][name]).abs().max() < 1e-6 for name in other)
