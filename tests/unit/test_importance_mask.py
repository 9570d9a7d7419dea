"""Tokens on which engine and trainer differ too much take no part in the policy loss."""

import math

import numpy as np
import pytest
import torch
from helpers.models import save_tiny_model, tiny_model
from helpers.plain_training import Plain, PlainTrainer
from helpers.rollouts import Response, rollout_batch
from helpers.runs import run_config

from megatron_laser.algorithms.policy_loss import importance_outside
from megatron_laser.model import platform

platform.install()

from megatron_laser.trainer.trainer import Trainer  # noqa: E402

BOUNDS = (0.5, 2.0)


def test_ratios_on_the_bounds_are_inside_and_nan_is_outside():
    ratios = torch.tensor([0.4, 0.51, 1.0, 1.99, 2.1, math.inf, math.nan, 0.0])
    rollout = torch.full((8,), -3.0)
    outside = importance_outside(rollout + ratios.log(), rollout, BOUNDS)
    assert outside.tolist() == [True, False, False, False, True, True, True, True]
    same = torch.tensor([-1.0, -2.0])
    assert not importance_outside(same, same, (0.0, 1.0)).any()


def test_shapes_and_bounds_are_checked():
    with pytest.raises(ValueError, match=r"\[rows\]"):
        importance_outside(torch.zeros(2), torch.zeros(3), BOUNDS)
    with pytest.raises(ValueError, match=r"policy\.importance_mask is \[2, 1\]"):
        importance_outside(torch.zeros(2), torch.zeros(2), (2.0, 1.0))


@pytest.mark.parametrize("cap", [None, 1.5])
def test_masked_tokens_have_no_weight_and_are_counted(single_process, tmp_path, cap):
    """The first step's policy loss from its formula: on-policy the ratio is 1, so each token gives -A."""
    save_tiny_model(tmp_path / "model", "qwen2")
    flat = rollout_batch([[Response(9, True), Response(12, False)], [Response(7, False), Response(4, True)]])
    config = run_config(
        tmp_path,
        tmp_path / "model",
        laser={"enabled": False},
        policy={"importance_mask": list(BOUNDS), "importance_cap": cap},
        rollout={"prompts_per_step": 2, "samples_per_prompt": 2},
    )
    trainer = Trainer(config, single_process, score_token_id=None)
    model = tiny_model("qwen2")
    with torch.no_grad():
        plain = PlainTrainer(model, Plain(0, 0, 0, 1.0, "recompute"))
        logprobs = np.concatenate([plain.logprobs(model, flat, i)[0].numpy() for i in range(4)])
    ratio = np.exp(logprobs - flat.rollout_logprobs)
    weight = np.where(
        (ratio < BOUNDS[0]) | (ratio > BOUNDS[1]), 0.0, 1.0 if cap is None else np.minimum(ratio, cap)
    )
    result = trainer.train_step(flat, 1)
    advantages = np.repeat(result.advantages.numpy(), flat.response_lengths)
    masked = float((weight == 0).mean())
    assert 0.0 < masked < 1.0
    assert result.metrics["importance_masked_fraction"] == pytest.approx(masked)
    assert result.metrics["policy_loss"] == pytest.approx(-(weight * advantages).mean(), rel=1e-4)
