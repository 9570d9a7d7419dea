"""Values of tokens for dumps on data-, tensor-, pipeline- and context-parallel ranks; both ranks' timeline."""

from pathlib import Path

import numpy as np
import pytest
from helpers.models import save_tiny_model
from helpers.plain_training import AT_ONCE, LASER, OPTIMIZER
from helpers.ranks import run_ranks
from helpers.rollouts import STEPS, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.model import platform

platform.install()

from megatron_laser.trainer.trainer import Trainer  # noqa: E402

WORKER = Path(__file__).with_name("token_values_worker.py")


@pytest.mark.distributed
def test_two_ranks_bring_the_tokens_of_one_process_to_rank_0(single_process, tmp_path):
    model = tmp_path / "model"
    save_tiny_model(model, "qwen2")
    config = run_config(
        tmp_path / "one",
        model,
        "logging.rollouts_every=1",
        "logging.rollouts_tokens=true",
        laser=LASER | AT_ONCE,
        optimizer=OPTIMIZER,
    )
    found = Trainer(config, single_process, score_token_id=SCORE_TOKEN).train_step(rollout_batch(STEPS[0]), 1)
    expected = np.stack([found.tokens.policy_logprobs, found.tokens.entropy])
    assert np.isfinite(expected).all() and (expected != 0).all()
    np.save(tmp_path / "expected.npy", expected)
    run_ranks(WORKER, 2, tmp_path, model, tmp_path / "expected.npy")
