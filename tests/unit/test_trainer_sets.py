"""Training on responses that were sampled from sets of tokens, against a plain implementation; and old == rollout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import save_tiny_model, tiny_model
from helpers.plain_sets import PlainOverSets, batch_with_sets
from helpers.plain_training import AT_ONCE, OPTIMIZER, TOKEN_MEANS, Plain
from helpers.plain_training import LASER as PLAIN_LASER
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.batching.flat import flatten
from megatron_laser.model import platform
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.types import Group, Prompt, RolloutBatch, Sample, SamplingParams

platform.install()

from megatron_laser.ops import configure, settings  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

LASER = PLAIN_LASER | AT_ONCE
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer-sets")
    for family in ("qwen2", "qwen2-tied"):
        save_tiny_model(folder / family, family)
    return folder


def build(model_folder, tmp_path, runtime, *overrides, family="qwen2", laser=LASER, **sections):
    sections = {"rollout": {"prompts_per_step": 4, "temperature": TEMPERATURE}} | sections
    config = run_config(
        tmp_path, model_folder / family, *overrides, laser=laser, optimizer=OPTIMIZER, **sections
    )
    return Trainer(config, runtime, score_token_id=SCORE_TOKEN if config.laser.enabled else None)


ALL_TERMS = {"importance_cap": 1.2, "kl_coefficient": 0.3, "entropy_coefficient": 0.02}


@pytest.mark.parametrize(
    ("policy", "laser", "family"),
    [
        ({"old_logprobs": "recompute", **ALL_TERMS}, LASER, "qwen2"),
        ({"old_logprobs": "rollout"}, LASER, "qwen2-tied"),
        ({"old_logprobs": "on_policy"}, {"enabled": False}, "qwen2"),
    ],
    ids=["all terms", "laser, off-policy, tied", "grpo, on-policy"],
)
def test_two_steps_equal_a_plain_implementation(
    single_process, model_folder, tmp_path, policy, laser, family
):
    trainer = build(model_folder, tmp_path, single_process, policy=policy, laser=laser, family=family)
    plain = PlainOverSets(
        tiny_model(family),
        Plain(
            temperature=TEMPERATURE,
            reference=tiny_model(family) if "kl_coefficient" in policy else None,
            **OPTIMIZER,
            **policy,
            **(PLAIN_LASER if laser is LASER else {}),
        ),
    )
    initial = tiny_model(family)
    for step in (1, 2):
        flat, noise = batch_with_sets(step, initial, TEMPERATURE)
        expected = plain.step(flat, with_loss=laser is LASER, with_mixing=laser is LASER)
        result = trainer.train_step(flat, step)
        for name in ("policy_loss", "grad_norm", *TOKEN_MEANS):
            assert result.metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (step, name)
        assert result.metrics.get("kl_loss", 0.0) == pytest.approx(expected["kl_loss"], rel=1e-5, abs=1e-6)
        if step == 1:
            assert result.metrics["logprob_diff_max"] == pytest.approx(np.abs(noise).max(), rel=1e-4)
        assert result.scores.tolist() == pytest.approx(expected["scores"], abs=1e-5, nan_ok=True)
    trained = dict(trainer.weight_stream())
    for name, parameter in plain.model.named_parameters():
        assert (trained[name] - parameter).abs().max() < 2e-6, name


def test_the_update_does_not_depend_on_micro_batches_or_tiles(single_process, model_folder, tmp_path):
    initial, runs = tiny_model("qwen2"), []
    for name, budget, tile in (("whole", 4096, settings().tile_bytes), ("cut", 128, 4 * 250 * 3)):
        before = configure(tile_bytes=tile)
        trainer = build(
            model_folder,
            tmp_path / name,
            single_process,
            policy={"old_logprobs": "recompute", "entropy_coefficient": 0.02},
            rollout={"max_new_tokens": 64, "prompts_per_step": 4, "temperature": TEMPERATURE},
            batching={"tokens_per_micro_batch": budget},
            data={"max_prompt_tokens": 16},
        )
        metrics = trainer.train_step(batch_with_sets(1, initial, TEMPERATURE)[0], 1).metrics
        runs.append((metrics, {name: tensor.clone() for name, tensor in trainer.weight_stream()}))
        configure(tile_bytes=before.tile_bytes)
    (whole, weights), (cut, others) = runs
    assert whole["micro_batches"] < cut["micro_batches"]
    assert cut["policy_loss"] == pytest.approx(whole["policy_loss"], rel=1e-5, abs=1e-7)
    assert all((others[name] - weights[name]).abs().max() < 1e-6 for name in weights)


def test_the_trainer_finds_the_log_probs_that_the_in_process_engine_sampled_with(
    single_process, model_folder, tmp_path
):
    engine = InProcessEngine(model_folder / "qwen2", dtype=torch.float32, device=torch.device("cpu"))
    sampling = SamplingParams(4, 20, (1,), temperature=TEMPERATURE, top_p=0.9, top_k=20, seed=2)
    prompts = [[5, 9, 200], [7], [3, 3, 40, 41], [100, 101]]
    groups = []
    for row, (prompt, found) in enumerate(
        zip(prompts, engine.generate(prompts, sampling, deadline=60), strict=True)
    ):
        samples = [
            Sample(prompt, one, "", one.is_scored((1,)), float(i % 2), "") for i, one in enumerate(found)
        ]
        groups.append(Group(Prompt(row, "", "", prompt), samples))
    flat = flatten(RolloutBatch(1, 0, groups))
    trainer = build(
        model_folder,
        tmp_path,
        single_process,
        laser={"enabled": False},  # no row is of the whole vocabulary then
        rollout={"prompts_per_step": 4, "temperature": TEMPERATURE, "top_p": 0.9, "top_k": 20},
    )
    metrics = trainer.train_step(flat, 1).metrics
    assert metrics["logprob_diff_max"] < 1e-5
    # The same tokens as if they came from the whole vocabulary are another policy's.
    whole = replace(flat, set_counts=flat.set_counts[:0], set_ids=flat.set_ids[:0])
    other = build(model_folder, tmp_path / "whole", single_process)
    assert other.train_step(whole, 1).metrics["logprob_diff_mean"] > 0.5
