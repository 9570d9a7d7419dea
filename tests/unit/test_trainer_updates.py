"""Several optimizer steps on one rollout batch, against the plain implementation: every estimator and aggregation."""

import itertools

import pytest
import torch
from helpers.models import save_tiny_model, tiny_model
from helpers.plain_training import TOKEN_MEANS, Plain, PlainTrainer
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.model import platform

platform.install()

from megatron_laser.trainer.trainer import Trainer  # noqa: E402

R, W = (lambda n: Response(n, True)), (lambda n: Response(n, False))
T, EMPTY = (lambda n: Response(n, False, True)), Response(0, False, True)
# Truncated and empty responses, a group that is all wrong, one that is all right, one wholly truncated.
STEPS = [
    [[R(5), W(12), EMPTY], [W(2), R(9), T(14)], [R(4), EMPTY, W(1)], [W(3), W(7), T(8)]],
    [[R(5), R(6), R(2)], [EMPTY, R(9), W(6)], [T(11), T(4), EMPTY], [R(9), W(9), W(4)]],
    [[R(15), W(3), R(1)], [W(2), R(8), T(12)], [R(7), W(7), EMPTY], [W(1), W(5), R(17)]],
]
ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_pp")
AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length")
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "grad_clip": 0.5, "eps": 1e-5}
LASER = {"ref_logprob": -6.0, "beta": 0.4, "alpha": 0.5, "tau": 0.3, "std_threshold": 0.02}
# With LaSeR each value once, and without it half of them in other pairs; the rest in tests that are `long`.
PLAIN = list(zip(ESTIMATORS, AGGREGATIONS))
WITH_LASER = list(zip(ESTIMATORS, (*AGGREGATIONS[1:], AGGREGATIONS[0])))
CASES = [(*pair, True) for pair in WITH_LASER] + [(*pair, False) for pair in PLAIN[:2]]
CASES += [pytest.param(*pair, False, marks=pytest.mark.long) for pair in PLAIN[2:]]
CASES += [
    pytest.param(*pair, True, marks=pytest.mark.long)
    for pair in itertools.product(ESTIMATORS, AGGREGATIONS)
    if pair not in WITH_LASER
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("updates") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


@pytest.mark.parametrize(
    ("estimator", "aggregation", "laser"),
    CASES,
    ids=lambda value: {True: "laser", False: "plain"}.get(value, value),
)
def test_two_epochs_of_two_updates_equal_a_plain_implementation(
    single_process, model_folder, tmp_path, estimator, aggregation, laser
):
    policy = {
        "advantage": estimator,
        "loss_aggregation": aggregation,
        "minibatches": 2,
        "epochs": 2,
        "old_logprobs": "recompute",
    }
    warm_ups = {"reasoning_warmup_steps": 1, "self_reward_warmup_steps": 1}
    config = run_config(
        tmp_path,
        model_folder,
        laser=LASER | warm_ups | {"score_token": SCORE_TOKEN} if laser else {"enabled": False},
        optimizer=OPTIMIZER,
        policy=policy,
        rollout={"samples_per_prompt": 3, "temperature": 0.8},
    )
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN if laser else None)
    extra = LASER | {"score_token": SCORE_TOKEN} if laser else {}
    plain = PlainTrainer(tiny_model("qwen2"), Plain(temperature=0.8, **OPTIMIZER, **policy, **extra))
    for step, groups in enumerate(STEPS, start=1):
        flat = rollout_batch(groups, seed=step)
        expected = plain.step(flat, with_loss=laser and step >= 2, with_mixing=laser and step >= 3)
        result = trainer.train_step(flat, step)
        for name in ("policy_loss", "grad_norm", *TOKEN_MEANS):
            assert result.metrics[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-6), (step, name)
        error = result.metrics.get("self_reward_loss" if step >= 2 else "self_reward_error", 0.0)
        assert error == pytest.approx(expected["self_reward_loss"], rel=2e-5, abs=1e-6)
        assert result.advantages.tolist() == pytest.approx(expected["advantages"], abs=2e-4)
        assert len(result.updates) == 4 and result.metrics["bad_steps"] == 0
    trained = dict(trainer.weight_stream())
    start = dict(tiny_model("qwen2").named_parameters())
    for name, parameter in plain.model.named_parameters():
        assert (trained[name] - parameter).abs().max() < 1e-6, name
        assert (parameter - start[name]).abs().max() > 1e-4, name
    assert (result.metrics["advantage_mixed_fraction"] > 0) == laser


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_for_a_whole_step_leave_only_the_self_reward_loss(
    single_process, model_folder, tmp_path, estimator
):
    """Every answer right: no advantage; the class of wrong answers is empty and its weight unused."""
    groups = [[R(4), R(9), R(2)], [R(3), R(3), R(8)]]
    moved = {}
    for alpha in (0.0, 0.5):
        settings = LASER | {"score_token": SCORE_TOKEN, "reasoning_warmup_steps": 0, "alpha": alpha}
        config = run_config(
            tmp_path / str(alpha),
            model_folder,
            laser=settings,
            optimizer=OPTIMIZER | {"weight_decay": 0.0},
            policy={"advantage": estimator},
            rollout={"prompts_per_step": 2, "samples_per_prompt": 3},
        )
        trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
        start = {name: tensor.clone() for name, tensor in trainer.weight_stream()}
        result = trainer.train_step(rollout_batch(groups), 1)
        assert torch.equal(result.advantages, torch.zeros(6))
        error = result.metrics["self_reward_loss" if alpha else "self_reward_error"]
        assert result.metrics["policy_loss"] == 0.0 and error > 0.0
        moved[alpha] = max(float((t - start[name]).abs().max()) for name, t in trainer.weight_stream())
    assert moved[0.0] == 0.0 and moved[0.5] > 1e-4


@pytest.mark.parametrize("length", [6, 0], ids=["truncated", "empty"])
def test_a_step_without_any_score_has_no_self_reward_loss_and_goes_on(
    single_process, model_folder, tmp_path, length
):
    settings = LASER | {
        "score_token": SCORE_TOKEN,
        "reasoning_warmup_steps": 0,
        "self_reward_warmup_steps": 0,
    }
    rollout = {"prompts_per_step": 2, "samples_per_prompt": 2}
    config = run_config(tmp_path, model_folder, laser=settings, optimizer=OPTIMIZER, rollout=rollout)
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    groups = [[Response(length, True, True), T(length)], [T(length), Response(length, True, True)]]
    result = trainer.train_step(rollout_batch(groups), 1)
    assert result.scores.isnan().all() and result.zc_logprobs.isnan().all()
    assert result.metrics["self_reward_loss"] == 0.0 and result.metrics["advantage_mixed_fraction"] == 0.0
    assert result.metrics["bad_steps"] == 0.0
    assert set(result.advantages.sign().tolist()) == {1.0, -1.0}  # the verifier's
    assert (result.metrics["grad_norm"] > 0.0) == (length > 0)


def test_a_token_id_outside_the_vocabulary_is_refused_by_name(single_process, model_folder, tmp_path):
    trainer = Trainer(run_config(tmp_path, model_folder), single_process, score_token_id=SCORE_TOKEN)
    flat = rollout_batch([[R(4), W(3)], [W(2), R(5)]])
    flat.tokens[flat.token_offsets[2] + flat.prompt_lengths[2]] = 250
    with pytest.raises(ValueError, match=r"token id 250 in the response of sample 2; expected 0 to 249"):
        trainer.train_step(flat, 1)
    flat.tokens[flat.token_offsets[1]] = -7
    with pytest.raises(ValueError, match=r"token id -7 in the prompt of sample 1"):
        trainer.train_step(flat, 1)
