"""What the trainer reads of each token for dumps, against a plain forward; and that reading it changes no number."""

import numpy as np
import pytest
import torch
from helpers.models import save_tiny_model, tiny_model
from helpers.plain_training import AT_ONCE, LASER, OPTIMIZER
from helpers.rollouts import STEPS, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config, state_of

from megatron_laser.model import platform

platform.install()

from megatron_laser.trainer.trainer import Trainer  # noqa: E402

TEMPERATURE = 0.8
TOKENS = ["logging.rollouts_every=2", "logging.rollouts_tokens=true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("token-values") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


def build(model, folder, runtime, *overrides, **policy):
    config = run_config(
        folder,
        model,
        *overrides,
        policy=policy,
        laser=LASER | AT_ONCE,
        optimizer=OPTIMIZER,
        rollout={"temperature": TEMPERATURE},
    )
    return Trainer(config, runtime, score_token_id=SCORE_TOKEN)


def plain(flat, model):
    """[response tokens] log-probs and entropies in float64, one response at a time."""
    logprobs, entropies = [], []
    with torch.no_grad():
        for index in range(flat.num_samples):
            ids = torch.from_numpy(
                flat.tokens[flat.token_offsets[index] : flat.token_offsets[index + 1]]
            ).long()
            rows = torch.log_softmax(model(ids[None]).logits[0].double() / TEMPERATURE, -1)
            first = int(flat.prompt_lengths[index]) - 1
            rows = rows[first:-1]
            logprobs += rows.gather(1, ids[first + 1 :, None])[:, 0].tolist()
            entropies += (-(rows.exp() * rows).sum(-1)).tolist()
    return np.array(logprobs), np.array(entropies)


@pytest.mark.parametrize("share", ["true", "false"])
def test_each_token_has_the_log_prob_and_the_entropy_of_a_plain_forward(
    single_process, model, tmp_path, share
):
    trainer = build(model, tmp_path, single_process, *TOKENS, f"batching.share_prompts={share}")
    flat = rollout_batch(STEPS[0])
    found = trainer.train_step(flat, 2).tokens
    logprobs, entropies = plain(flat, tiny_model("qwen2"))
    np.testing.assert_allclose(found.policy_logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(found.entropy, entropies, atol=1e-5)


def test_reading_tokens_changes_neither_metrics_nor_weights(single_process, model, tmp_path):
    with_tokens = build(model, tmp_path / "a", single_process, *TOKENS)
    without = build(model, tmp_path / "b", single_process)
    for step in (1, 2):
        flat = rollout_batch(STEPS[step - 1], seed=step)
        results = [trainer.train_step(flat, step) for trainer in (with_tokens, without)]
        assert (results[0].tokens is not None) == (step == 2) and results[1].tokens is None
        assert results[0].metrics == pytest.approx(results[1].metrics, rel=0, abs=0, nan_ok=True)
        assert torch.equal(results[0].scores.nan_to_num(), results[1].scores.nan_to_num())
    for one, other in zip(state_of(with_tokens), state_of(without), strict=True):
        assert torch.equal(one, other)


def test_the_engines_log_probs_in_place_of_a_pass_leave_tokens_unread(single_process, model, tmp_path):
    trainer = build(model, tmp_path, single_process, *TOKENS, old_logprobs="rollout")
    assert trainer.train_step(rollout_batch(STEPS[0]), 2).tokens is None
