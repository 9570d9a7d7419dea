"""The trainer against a plain implementation with transformers and torch's AdamW, on one process."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import save_tiny_model, tiny_model
from helpers.plain_training import LASER as PLAIN_LASER
from helpers.plain_training import OPTIMIZER, TOKEN_MEANS, Plain, PlainTrainer
from helpers.rollouts import STEPS, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.model import platform
from megatron_laser.ops import settings
from megatron_laser.ops.torch_backend import TorchEngine

platform.install()

from megatron_laser.trainer import trainer as trainer_module  # noqa: E402
from megatron_laser.trainer.step_data import make_micro_batch  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

# step 1 plain, step 2 with the self-reward loss, step 3 with mixed advantages
LASER = PLAIN_LASER | {"reasoning_warmup_steps": 1, "self_reward_warmup_steps": 1}
FIRST_LOSS, FIRST_MIXING = 2, 3


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    save_tiny_model(folder / "qwen2", "qwen2")
    save_tiny_model(folder / "qwen2-tied", "qwen2-tied")
    return folder


def batch_of(step, model, temperature):
    """Rollouts whose log-probs are the initial model's with noise, so that some ratios are clipped."""
    flat = rollout_batch(STEPS[step - 1], seed=step)
    with torch.no_grad():
        plain = PlainTrainer(model, Plain(0, 0, 0, temperature, "rollout"))
        logprobs = [plain.logprobs(model, flat, i)[0].numpy() for i in range(flat.num_samples)]
    noise = np.random.default_rng(step).normal(0.0, 0.3, len(flat.rollout_logprobs))
    return replace(flat, rollout_logprobs=(np.concatenate(logprobs) + noise).astype(np.float32))


def build(model_folder, tmp_path, runtime, *overrides, laser=None, family="qwen2", **sections):
    settings = LASER if laser is None else laser
    config = run_config(
        tmp_path, model_folder / family, *overrides, laser=settings, optimizer=OPTIMIZER, **sections
    )
    score_token = SCORE_TOKEN if config.laser.enabled else None
    return Trainer(config, runtime, score_token_id=score_token)


CASES = {
    "laser, off-policy": dict(
        policy={"old_logprobs": "rollout"}, plain=dict(old_logprobs="rollout", **PLAIN_LASER)
    ),
    "grpo, off-policy": dict(
        policy={"old_logprobs": "rollout"}, laser={"enabled": False}, plain=dict(old_logprobs="rollout")
    ),
    "laser, on-policy, tied": dict(
        policy={"old_logprobs": "on_policy"},
        family="qwen2-tied",
        plain=dict(old_logprobs="on_policy", **PLAIN_LASER),
    ),
    # What rollout.ahead and rollout.oversample ask for where nothing is recomputed.
    "laser, older weights, truncated importance sampling": dict(
        policy={"old_logprobs": "on_policy", "importance_cap": 1.2},
        plain=dict(old_logprobs="on_policy", importance_cap=1.2, **PLAIN_LASER),
    ),
    "laser, other targets": dict(
        policy={"old_logprobs": "recompute"},
        laser=LASER | {"targets": [0.7, -0.4]},
        plain=dict(old_logprobs="recompute", **PLAIN_LASER | {"targets": (0.7, -0.4)}),
    ),
    "laser, two updates per batch": dict(
        policy={"old_logprobs": "recompute", "minibatches": 2},
        plain=dict(old_logprobs="recompute", minibatches=2, **PLAIN_LASER),
    ),
    "all terms": dict(
        policy={
            "old_logprobs": "recompute",
            "importance_cap": 1.2,
            "kl_coefficient": 0.3,
            "entropy_coefficient": 0.02,
        },
        plain=dict(
            old_logprobs="recompute",
            importance_cap=1.2,
            kl_coefficient=0.3,
            entropy_coefficient=0.02,
            **PLAIN_LASER,
        ),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_three_steps_equal_a_plain_implementation(single_process, model_folder, tmp_path, case):
    case = dict(case)
    temperature, family = 0.8, case.get("family", "qwen2")
    plain_settings = case.pop("plain")
    trainer = build(
        model_folder,
        tmp_path,
        single_process,
        rollout={"prompts_per_step": 4, "temperature": temperature},
        **case,
    )
    reference = tiny_model(family) if plain_settings.get("kl_coefficient") else None
    optimizer = {name: OPTIMIZER[name] for name in ("lr", "weight_decay", "grad_clip", "eps")}
    plain = PlainTrainer(
        tiny_model(family), Plain(temperature=temperature, reference=reference, **optimizer, **plain_settings)
    )
    initial = tiny_model(family)
    laser = "score_token" in plain_settings
    for step in (1, 2, 3):
        flat = batch_of(step, initial, temperature)
        expected = plain.step(
            flat, with_loss=laser and step >= FIRST_LOSS, with_mixing=laser and step >= FIRST_MIXING
        )
        result = trainer.train_step(flat, step)
        metrics = result.metrics
        for name in ("policy_loss", "grad_norm", *TOKEN_MEANS):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (step, name)
        assert metrics.get("kl_loss", 0.0) == pytest.approx(expected["kl_loss"], rel=1e-5, abs=1e-6)
        # What the loss does not have is not logged as a part of it.
        assert ("kl_loss" in metrics) == ("reference_kl" in metrics) == (reference is not None)
        trained = laser and step >= FIRST_LOSS
        assert ("self_reward_loss" in metrics, "self_reward_error" in metrics) == (
            trained,
            laser and not trained,
        )
        assert result.scores.tolist() == pytest.approx(expected["scores"], abs=1e-5, nan_ok=True)
        assert result.advantages.tolist() == pytest.approx(expected["advantages"], abs=2e-4)
        assert result.metrics["lr"] == OPTIMIZER["lr"]
        if laser:
            error = metrics["self_reward_loss" if trained else "self_reward_error"]
            assert error == pytest.approx(expected["self_reward_loss"], rel=1e-5) and error > 0
    trained = dict(trainer.weight_stream())
    start = dict(initial.named_parameters())
    for name, parameter in plain.model.named_parameters():
        assert (trained[name] - parameter).abs().max() < 2e-6, name  # a five-hundredth of an update
        assert (parameter - start[name]).abs().max() > 1e-4, name
    assert set(trained) == set(start)


def test_the_mixed_share_and_the_clipped_share_are_reported(single_process, model_folder, tmp_path):
    trainer = build(model_folder, tmp_path, single_process, policy={"old_logprobs": "rollout"})
    initial = tiny_model("qwen2")
    results = [trainer.train_step(batch_of(step, initial, 1.0), step) for step in (1, 2, 3)]
    assert [result.metrics["advantage_mixed_fraction"] > 0 for result in results] == [False, False, True]
    assert all(0.0 < result.metrics["clip_fraction"] < 1.0 for result in results)


def test_mismatch_metrics_compare_the_trainer_with_the_rollouts(single_process, model_folder, tmp_path):
    trainer = build(model_folder, tmp_path, single_process)
    initial = tiny_model("qwen2")
    flat = batch_of(1, initial, 1.0)
    metrics = trainer.train_step(flat, 1).metrics
    noise = np.random.default_rng(1).normal(0.0, 0.3, len(flat.rollout_logprobs))  # rollout - trainer
    assert metrics["logprob_diff_mean"] == pytest.approx(np.abs(noise).mean(), rel=1e-4)
    assert metrics["logprob_diff_max"] == pytest.approx(np.abs(noise).max(), rel=1e-4)
    # k3 estimate of KL(rollout || trainer): pi / pi_rollout - 1 - log(pi / pi_rollout)
    assert metrics["rollout_k3_kl"] == pytest.approx((np.exp(-noise) - 1 + noise).mean(), rel=1e-4)


def train(trainer, initial, steps=(1, 2, 3)):
    results = [trainer.train_step(batch_of(step, initial, 1.0), step) for step in steps]
    return results, {name: tensor.clone() for name, tensor in trainer.weight_stream()}


@pytest.mark.parametrize("old_logprobs", ["rollout", "recompute"])
def test_micro_batches_without_samples_change_nothing(
    single_process, model_folder, tmp_path, monkeypatch, old_logprobs
):
    policy = {"old_logprobs": old_logprobs, "kl_coefficient": 0.1}
    initial = tiny_model("qwen2")
    expected, weights = train(build(model_folder, tmp_path / "a", single_process, policy=policy), initial)
    prepare = trainer_module.prepare_step

    def with_empty_micro_batches(flat, config, **arguments):
        data = prepare(flat, config, **arguments)
        empty = lambda: make_micro_batch(  # noqa: E731
            flat, [], score_token_id=arguments["score_token_id"], temperature=1.0, pad_multiple=2
        )
        for minibatch in data.minibatches:
            minibatch.micro_batches = [empty(), *minibatch.micro_batches, empty()]
        return data

    monkeypatch.setattr(trainer_module, "prepare_step", with_empty_micro_batches)
    results, others = train(build(model_folder, tmp_path / "b", single_process, policy=policy), initial)
    for mine, theirs in zip(results, expected):
        for name, value in theirs.metrics.items():
            if name != "micro_batches":
                assert mine.metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert all((others[name] - weights[name]).abs().max() < 1e-7 for name in weights)


def test_the_update_does_not_depend_on_the_token_budget(single_process, model_folder, tmp_path):
    initial = tiny_model("qwen2")
    runs = {}
    for budget in (128, 4096):
        sections = dict(
            rollout={"max_new_tokens": 64},
            batching={"tokens_per_micro_batch": budget},
            data={"max_prompt_tokens": 16},
        )
        runs[budget] = train(build(model_folder, tmp_path / str(budget), single_process, **sections), initial)
    few, many = runs[4096], runs[128]
    assert few[0][0].metrics["micro_batches"] < many[0][0].metrics["micro_batches"]
    assert all((few[1][name] - many[1][name]).abs().max() < 1e-6 for name in few[1])


def test_the_update_does_not_depend_on_the_padding(single_process, model_folder, tmp_path):
    initial = tiny_model("qwen2")
    runs = [
        train(
            build(model_folder, tmp_path / str(pad), single_process, f"batching.pad_multiple={pad}"),
            initial,
            steps=(1,),
        )
        for pad in (1, 64)
    ]
    (plain, weights), (padded, others) = runs
    # Rounding differs with the shapes of batches.
    for name, value in plain[0].metrics.items():
        assert padded[0].metrics[name] == pytest.approx(value, rel=4e-6, abs=1e-9), name
    assert all((others[name] - weights[name]).abs().max() < 1e-6 for name in weights)


def test_entropy_is_differentiated_only_when_the_loss_has_it(
    single_process, model_folder, tmp_path, monkeypatch
):
    seen = []
    gradients = TorchEngine.gradients

    def spy(self, problem, upstream, *rest):
        seen.append(upstream.grad_entropy is not None)
        return gradients(self, problem, upstream, *rest)

    monkeypatch.setattr(TorchEngine, "gradients", spy)
    for coefficient in (0.0, 0.02):
        policy = {"entropy_coefficient": coefficient}
        trainer = build(model_folder, tmp_path / str(coefficient), single_process, policy=policy)
        seen.clear()
        results, _ = train(trainer, tiny_model("qwen2"), steps=(1,))
        assert results[0].metrics["entropy"] > 0.0
        assert seen and set(seen) == {coefficient > 0.0}


@pytest.mark.parametrize(
    "settings",
    [
        ["recompute=mlp"],
        ["recompute=core_attn"],
        ["recompute=[mlp, core_attn]"],
        ["recompute=full"],
        ["recompute=full", "recompute_layers=1"],
        ["recompute=full", "offload_activations=true"],
    ],
    ids=", ".join,
)
def test_recomputation_gives_the_same_update(single_process, model_folder, tmp_path, settings):
    initial = tiny_model("qwen2")
    plain = train(build(model_folder, tmp_path / "a", single_process), initial)[1]
    other = build(model_folder, tmp_path / "b", single_process, *(f"model.{setting}" for setting in settings))
    recomputed = train(other, initial)[1]
    assert all((plain[name] - recomputed[name]).abs().max() < 1e-7 for name in plain)


def test_training_twice_is_bitwise_equal(single_process, model_folder, tmp_path):
    initial = tiny_model("qwen2")
    first = train(build(model_folder, tmp_path / "a", single_process), initial)[1]
    again = train(build(model_folder, tmp_path / "b", single_process), initial)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_bfloat16_keeps_float32_main_weights(single_process, model_folder, tmp_path):
    """Updates far below bfloat16's resolution of the weights still add up."""
    trainer = build(model_folder, tmp_path, single_process, "model.dtype=bfloat16", "optimizer.lr=1.0e-6")
    initial = tiny_model("qwen2")
    flat = batch_of(1, initial, 1.0)
    mains = [group["params"] for group in trainer.policy.optimizer.param_groups]
    assert all(parameter.dtype == torch.float32 for group in mains for parameter in group)
    before = [parameter.clone() for group in mains for parameter in group]
    trainer.train_step(flat, 1)
    after = [parameter for group in mains for parameter in group]
    assert all(0 < (a - b).abs().max() < 1e-5 for a, b in zip(after, before))
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in trainer.weight_stream())


def test_without_clipping_the_gradient_norm_is_still_reported(single_process, model_folder, tmp_path):
    flat = batch_of(1, tiny_model("qwen2"), 1.0)
    norms = [
        build(model_folder, tmp_path / str(clip), single_process, f"optimizer.grad_clip={clip}")
        .train_step(flat, 1)
        .metrics["grad_norm"]
        for clip in (0.5, 0.0)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 0.5


def test_learning_rate_warms_up_and_falls_as_its_setting_says(single_process, model_folder, tmp_path):
    overrides = [
        "optimizer.schedule=linear",
        "optimizer.warmup_steps=2",
        "run.steps=6",
        "optimizer.min_lr=1.0e-4",
    ]
    trainer = build(model_folder, tmp_path, single_process, *overrides)
    flat = batch_of(1, tiny_model("qwen2"), 1.0)
    rates = [trainer.train_step(flat, step).metrics["lr"] for step in range(1, 7)]
    peak, low = 1e-3, 1e-4
    expected = [peak / 2, peak, *(low + (peak - low) * left / 4 for left in (3, 2, 1, 0))]
    assert rates == pytest.approx(expected)


def test_the_servers_score_is_used_when_asked_for(single_process, model_folder, tmp_path):
    trainer = build(model_folder, tmp_path, single_process, "laser.score_source=server")
    flat = batch_of(1, tiny_model("qwen2"), 1.0)
    zc = np.where(flat.scored, np.linspace(-6, -4, flat.num_samples), np.nan).astype(np.float32)
    result = trainer.train_step(replace(flat, zc_logprobs=zc), 1)
    assert result.zc_logprobs.tolist() == pytest.approx(zc.tolist(), nan_ok=True)
    assert result.scores.tolist() == pytest.approx((0.4 * (zc + 6.0)).tolist(), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("old_logprobs", ["recompute", "on_policy"])
def test_the_servers_scores_are_compared_with_the_trainers(
    single_process, model_folder, tmp_path, old_logprobs
):
    """A score read at another position, or of other weights, trains advantages on something else."""
    settings = dict(policy={"old_logprobs": old_logprobs}, rollout={"prompts_per_step": 4})
    flat = batch_of(1, tiny_model("qwen2"), 1.0)
    own = build(model_folder, tmp_path, single_process, **settings).train_step(flat, 1)
    assert not any(name.startswith("zc_logprob_diff") for name in own.metrics)
    noise = np.linspace(-0.5, 1.0, flat.num_samples).astype(np.float32)
    zc = own.zc_logprobs.numpy() + noise
    trainer = build(model_folder, tmp_path, single_process, "laser.score_source=server", **settings)
    metrics = trainer.train_step(replace(flat, zc_logprobs=zc), 1).metrics
    scored = np.abs(noise[flat.scored])
    assert metrics["zc_logprob_diff_mean"] == pytest.approx(scored.mean(), rel=1e-4)
    assert metrics["zc_logprob_diff_max"] == pytest.approx(scored.max(), rel=1e-4)
    nothing = replace(flat, scored=np.zeros_like(flat.scored), zc_logprobs=np.full_like(zc, np.nan))
    metrics = trainer.train_step(nothing, 2).metrics
    assert math.isnan(metrics["zc_logprob_diff_mean"]) and math.isnan(metrics["zc_logprob_diff_max"])


def test_a_reference_models_score_replaces_the_constant_when_asked_for(
    single_process, model_folder, tmp_path
):
    """At the first step policy and reference are one model: every score is 0, and stays so nowhere else."""
    trainer = build(model_folder, tmp_path, single_process, "laser.reference=model")
    flat = batch_of(1, tiny_model("qwen2"), 1.0)
    first, second = (trainer.train_step(flat, step).scores[torch.from_numpy(flat.scored)] for step in (1, 2))
    assert first.abs().max() < 1e-5
    assert second.abs().max() > 1e-3


def test_laser_without_a_score_token_id_is_refused(single_process, model_folder, tmp_path):
    config = run_config(tmp_path, model_folder / "qwen2", laser=LASER)
    with pytest.raises(ValueError, match=r"laser\.score_token"):
        Trainer(config, single_process, score_token_id=None)


def test_the_heads_weight_gradient_goes_straight_into_main_grad(single_process, model_folder, tmp_path):
    for family in ("qwen2", "qwen2-tied"):
        trainer = build(model_folder, tmp_path / family, single_process, family=family)
        model = trainer.policy.chunks.models[0]
        tied = family == "qwen2-tied"
        weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
        assert not weight.grad_added_to_main_grad
        train(trainer, tiny_model(family), steps=(1,))
        assert weight.grad_added_to_main_grad and weight.main_grad.dtype == torch.float32


def test_the_memory_for_kept_logits_is_set_for_the_process(single_process, model_folder, tmp_path):
    for gib, expected in ((0.5, 2**29), (0, 0), ("null", None)):
        build(model_folder, tmp_path / str(gib), single_process, f"model.keep_logits_gib={gib}")
        assert settings().keep_logits_bytes == expected
