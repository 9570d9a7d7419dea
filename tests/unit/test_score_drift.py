"""What is measured on held responses equals a plain model's, and changes no training."""

import logging
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.held import batch, drifting_trainer, plain_logprobs, plain_metrics, trained
from helpers.models import save_tiny_model, tiny_model
from helpers.rollouts import T, rollout_batch
from helpers.runs import SCORE_TOKEN, state_of

from megatron_laser.model import platform
from megatron_laser.observability.timers import Timers

platform.install()

from megatron_laser.trainer import score_drift  # noqa: E402
from megatron_laser.trainer.held_responses import read_held  # noqa: E402
from megatron_laser.trainer.score_drift import ScoreDrift, reference_metrics  # noqa: E402

HELD = [0, 2, 3, 4, 5]  # of GROUPS, for 4
PAIR = {"name": "prefix", "position": {"every": 2}, "weight": 0.3}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


@pytest.mark.parametrize(
    ("sections", "before_end"),
    [
        ({"rollout": {"temperature": 0.7}}, False),  # which the score does not know
        # More minibatches than held groups, and micro-batches of a response or two.
        (
            {
                "policy": {"minibatches": 3},
                "rollout": {"prompts_per_step": 3},
                "batching": {"tokens_per_micro_batch": 128, "share_prompts": False},
                "laser": {"readouts": [{"position": "before_eos"}, PAIR]},
            },
            True,
        ),
    ],
    ids=["one micro-batch", "several, before the end, of two readouts"],
)
def test_metrics_are_those_of_a_plain_model_with_the_trained_weights(
    tmp_path, model_folder, single_process, sections, before_end
):
    trainer, drift = drifting_trainer(tmp_path, model_folder, single_process, **sections)
    first = batch(1)
    before = plain_logprobs(tiny_model("qwen2"), first, HELD, before_end=before_end)
    for step in (1, 2):
        drift.hold(batch(step), step)
        metrics = drift.measure(step, trainer.train_step(batch(step), step))
        now = plain_logprobs(trained(trainer), first, HELD, before_end=before_end)
        expected = plain_metrics(first, HELD, now, before)
        # Both models compute in float32: log-probs of about -6 nats are equal to a few ulps (5e-7).
        assert metrics == pytest.approx(expected, abs=1e-5)
        assert abs(metrics["drift/shift"]) > 0.05


def test_training_does_not_notice_and_off_measures_nothing(tmp_path, model_folder, single_process):
    def state(every):
        trainer, drift = drifting_trainer(
            tmp_path / str(every), model_folder, single_process, laser={"drift_every": every}
        )
        found = {}
        for step in (1, 2, 3):
            drift.hold(batch(step), step)
            found[step] = drift.measure(step, trainer.train_step(batch(step), step))
        return state_of(trainer), found

    (off, nothing), (on, found) = state(0), state(2)
    assert all(map(torch.equal, on, off))
    assert nothing == {1: {}, 2: {}, 3: {}}
    assert [bool(found[step]) for step in (1, 2, 3)] == [False, True, True]  # 3 is the last one
    assert not (tmp_path / "0" / "run" / "held_responses.npz").exists()


def test_the_reference_model_is_read_on_the_steps_own_responses(tmp_path, model_folder, single_process):
    trainer, drift = drifting_trainer(
        tmp_path, model_folder, single_process, policy={"kl_coefficient": 0.1}, run={"steps": 9}
    )
    for step in (1, 2):
        drift.hold(batch(step), step)
        metrics = drift.measure(step, trainer.train_step(batch(step), step))
    own = plain_logprobs(tiny_model("qwen2"), batch(2), [*HELD, 6, 7])
    assert metrics["drift/reference_mean"] == pytest.approx(statistics.mean(own) + 6.0, abs=1e-5)
    assert metrics["drift/reference_std"] == pytest.approx(statistics.stdev(own), abs=1e-5)


def test_without_a_constant_c_ref_is_the_reference_models_mean_on_what_is_held(
    tmp_path, model_folder, single_process
):
    """Also of responses that are held late, when the policy is another one."""
    trainer, drift = drifting_trainer(
        tmp_path, model_folder, single_process, laser={"reference": "model", "ref_logprob": None}
    )
    trainer.train_step(batch(1), 1)
    drift.hold(batch(2), 2)
    c_ref = statistics.mean(plain_logprobs(tiny_model("qwen2"), batch(2), HELD))
    assert read_held(trainer._config).c_ref == pytest.approx(c_ref, abs=1e-5)
    result = trainer.train_step(batch(2), 2)
    now = plain_logprobs(trained(trainer), batch(2), [0, 4])
    assert drift.measure(2, result)["drift/right"] == pytest.approx(statistics.mean(now) - c_ref, abs=1e-5)


def test_responses_of_an_attempt_that_is_not_gone_on_with_are_replaced(
    tmp_path, model_folder, single_process, caplog
):
    trainer, drift = drifting_trainer(tmp_path, model_folder, single_process)
    drift.hold(batch(1), 5)
    held, config = read_held(trainer._config), trainer._config
    assert held.flat.step == 5
    again = ScoreDrift(
        config, single_process, trainer, Timers(), score_token_id=SCORE_TOKEN, held=held, first_step=5
    )
    with caplog.at_level(logging.INFO):
        again.hold(batch(2), 5)
    assert "5 responses are held of step 5, 2 right; log pi(z_c) is" in caplog.text
    assert "counts from the weights before step 5, not from the initial ones" in caplog.text
    assert read_held(config).flat.tokens.tolist() != held.flat.tokens.tolist()
    later = ScoreDrift(
        config, single_process, trainer, Timers(), score_token_id=SCORE_TOKEN, held=held, first_step=6
    )
    later.hold(batch(3), 6)
    assert later._held is held


def test_a_step_without_a_score_is_passed_over_and_a_folder_that_cannot_be_written_is_no_end(
    tmp_path, model_folder, single_process, monkeypatch, caplog
):
    trainer, drift = drifting_trainer(tmp_path, model_folder, single_process)
    nothing = rollout_batch([[T(3), T(4)]])
    drift.hold(nothing, 1)
    assert drift.measure(1, trainer.train_step(batch(1), 1)) == {}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(score_drift, "write_held", full)
    drift.hold(batch(2), 2)
    assert "held responses cannot be written ([Errno 28] No space left on device)" in caplog.text
    assert drift.measure(2, trainer.train_step(batch(2), 2))["drift/held_step"] == 2.0


def test_a_token_that_the_model_has_not_is_refused_before_it_is_looked_up(
    tmp_path, model_folder, single_process
):
    _, drift = drifting_trainer(tmp_path, model_folder, single_process)
    flat = batch(1)
    tokens = flat.tokens.copy()
    tokens[0] = 250
    with pytest.raises(ValueError, match="token id 250"):
        drift.hold(replace(flat, tokens=tokens), 1)


def test_numbers_of_one_response_or_none_are_null():
    found = reference_metrics(np.array([-7.0, math.nan]), -6.0)
    assert found["drift/reference_mean"] == -1.0 and math.isnan(found["drift/reference_std"])
    assert math.isnan(reference_metrics(np.array([math.nan]), -6.0)["drift/reference_mean"])
