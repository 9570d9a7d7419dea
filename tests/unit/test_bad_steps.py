"""A loss or gradient that is not finite: the update is skipped whole, counted, dumped, and in the end stops the run."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.models import save_tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.data import DataError
from megatron_laser.model import platform

platform.install()

from megatron_laser.trainer.bad_steps import BadStepsError, read_dump, write_dump  # noqa: E402
from megatron_laser.trainer.trainer import MismatchError, Trainer  # noqa: E402

GROUPS = [
    [Response(5, True), Response(7, False), Response(3, False, True)],
    [Response(4, False), Response(6, True), Response(9, True)],
]
LASER = {"score_token": SCORE_TOKEN, "reasoning_warmup_steps": 0, "self_reward_warmup_steps": 0}
KINDS = {
    "fp32": (),
    "bf16": ("model.dtype=bfloat16",),
    "distributed optimizer": ("optimizer.distributed=true",),
    "bf16, distributed, overlapped": (
        "model.dtype=bfloat16",
        "optimizer.distributed=true",
        "optimizer.overlap_grad_reduce=true",
        "optimizer.overlap_param_gather=true",
    ),
    "without clipping": ("optimizer.grad_clip=0.0",),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_steps") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


def build(folder, model, runtime, *overrides, laser=None, **policy):
    config = run_config(
        folder,
        model,
        *overrides,
        laser=LASER | (laser or {}),
        optimizer={"lr": 1e-3},
        policy={"old_logprobs": "rollout"} | policy,
        rollout={"prompts_per_step": 2, "samples_per_prompt": 3},
    )
    return Trainer(config, runtime, score_token_id=SCORE_TOKEN)


def batch(seed, *, bad=None):
    """A batch whose engine log-prob of one token is `bad`: the loss is, but the gradient stays finite."""
    flat = rollout_batch(GROUPS, seed=seed)
    if bad is not None:
        flat.rollout_logprobs[7] = bad
    return flat


def state(trainer):
    """Every weight, every main weight and every number of Adam's state."""
    collected = {name: tensor.clone() for name, tensor in trainer.weight_stream()}
    for part, chained in enumerate(trainer.policy.optimizer.chained_optimizers):
        parameters = [p for group in chained.optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            collected[f"{part}.{number}.main"] = parameter.detach().clone()
            for kind, value in chained.optimizer.state.get(parameter, {}).items():
                collected[f"{part}.{number}.{kind}"] = torch.as_tensor(value).clone()
    return collected


def assert_equal_states(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_bad_batch_leaves_weights_and_adams_state_as_if_it_had_never_been(
    single_process, model_folder, tmp_path, kind
):
    trainer = build(tmp_path / "a", model_folder, single_process, *kind)
    trainer.train_step(batch(1), 1)
    before = state(trainer)
    result = trainer.train_step(batch(2, bad=math.nan), 2)
    assert_equal_states(state(trainer), before)
    assert result.metrics["bad_steps"] == 1.0
    assert math.isnan(result.metrics["policy_loss"]) and math.isnan(result.metrics["grad_norm"])
    after = trainer.train_step(batch(3), 3)
    assert after.metrics["bad_steps"] == 0.0

    other = build(tmp_path / "b", model_folder, single_process, *kind)
    other.train_step(batch(1), 1)
    assert other.train_step(batch(3), 3).metrics["policy_loss"] == after.metrics["policy_loss"]
    assert_equal_states(state(trainer), state(other))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_an_infinite_gradient_never_reaches_the_weights(single_process, model_folder, tmp_path, kind):
    trainer = build(tmp_path, model_folder, single_process, *kind, laser={"alpha": 1e38})
    before = state(trainer)
    result = trainer.train_step(batch(1), 1)
    assert "grad_norm" in result.updates[0].bad and "policy_loss" not in result.updates[0].bad
    assert_equal_states(state(trainer), before)


def test_only_the_bad_update_of_a_step_is_skipped(single_process, model_folder, tmp_path):
    """Token 7 is in the first group, so in the first of two minibatches, in both epochs."""
    trainer = build(tmp_path, model_folder, single_process, minibatches=2, epochs=2)
    before = state(trainer)
    result = trainer.train_step(batch(1, bad=math.nan), 1)
    assert [bool(update.bad) for update in result.updates] == [True, False, True, False]
    assert result.metrics["bad_steps"] == 2.0 and math.isfinite(result.metrics["policy_loss"])
    after = state(trainer)
    assert int(after["0.0.step"]) == 2 and any(not torch.equal(after[name], before[name]) for name in before)


def test_a_score_that_is_not_finite_skips_the_step_when_it_is_mixed_in(
    single_process, model_folder, tmp_path
):
    trainer = build(tmp_path, model_folder, single_process, "laser.score_source=server")
    flat = batch(1)
    flat.zc_logprobs[flat.scored] = -6.0
    flat.zc_logprobs[1] = math.nan
    before = state(trainer)
    result = trainer.train_step(flat, 1)
    assert [update.bad for update in result.updates] == [("zc_logprob",)]
    assert_equal_states(state(trainer), before)


def test_a_further_readout_whose_loss_is_not_finite_is_named_with_the_settings_of_the_weights(
    single_process, model_folder, tmp_path
):
    readouts = [{}, {"name": "wild", "beta": 1e30, "weight": 0.2}, {"name": "idle", "weight": 0.0}]
    trainer = build(
        tmp_path,
        model_folder,
        single_process,
        "run.max_bad_steps=1",
        laser={"readouts": readouts, "tau": 0.0},
    )
    with pytest.raises(BadStepsError) as error:
        trainer.train_step(batch(1), 1)
    assert "last one: 1 of 1 optimizer step(s) skipped: readout/wild/loss, total_loss, grad_norm not" in str(
        error.value
    )
    assert "lower optimizer.lr, laser.alpha or laser.readouts[1].weight, or look at" in str(error.value)


def test_a_bad_step_without_laser_names_none_of_its_settings(single_process, model_folder, tmp_path):
    trainer = build(tmp_path, model_folder, single_process, "run.max_bad_steps=1", laser={"enabled": False})
    with pytest.raises(BadStepsError, match=r"`; lower optimizer.lr, or look at its rewards and log-probs$"):
        trainer.train_step(batch(1, bad=math.nan), 1)


def test_the_batch_is_dumped_with_its_reason_and_the_nearest_checkpoint(
    single_process, model_folder, tmp_path
):
    trainer = build(tmp_path, model_folder, single_process)
    (tmp_path / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000003" / "state.json").write_text("{}")
    flat = batch(4, bad=math.nan)
    trainer.train_step(flat, 4)
    folder = tmp_path / "run" / "bad_steps" / "step_4"
    assert sorted(path.name for path in folder.iterdir()) == ["batch.npz", "config.yaml", "meta.json"]
    dump = read_dump(folder)
    assert dump.meta["step"] == 4 and dump.meta["score_token_id"] == SCORE_TOKEN
    assert dump.meta["bad_terms"] == ["policy_loss", "total_loss"]
    assert "policy_loss, total_loss not finite" in dump.meta["reason"]
    assert dump.meta["newest_checkpoint"] == str(tmp_path / "run" / "checkpoints" / "step_00000003")
    for name, array in flat.to_arrays().items():
        np.testing.assert_array_equal(dump.flat.to_arrays()[name], array)
    json.loads((folder / "meta.json").read_text(), parse_constant=pytest.fail)  # no NaN, which is no JSON


def test_bad_steps_in_a_row_stop_the_run_and_a_good_one_in_between_starts_the_count_anew(
    single_process, model_folder, tmp_path
):
    trainer = build(tmp_path, model_folder, single_process, "run.max_bad_steps=2")
    for step in (1, 3, 5):
        trainer.train_step(batch(step, bad=math.nan), step)
        trainer.train_step(batch(step + 1), step + 1)
    trainer.train_step(batch(7, bad=math.nan), 7)
    with pytest.raises(
        BadStepsError, match=r"step 8, rank 0: 2 steps in a row.*replay .*/bad_steps/step_8"
    ) as error:
        trainer.train_step(batch(8, bad=math.nan), 8)
    assert "policy_loss, total_loss not finite" in str(error.value)
    assert (tmp_path / "run" / "bad_steps" / "step_8" / "batch.npz").is_file()


def test_a_dump_that_cannot_be_written_does_not_stop_the_run(single_process, model_folder, tmp_path, caplog):
    trainer = build(tmp_path, model_folder, single_process)
    (tmp_path / "run").write_text("a file where the folder should be")
    assert trainer.train_step(batch(1, bad=math.nan), 1).metrics["bad_steps"] == 1.0
    assert "cannot be written" in caplog.text


def test_nothing_but_arrays_is_given_to_savez(tmp_path, monkeypatch):
    """Before NumPy 2.2 it takes no options: one more keyword is one more array, and the batch cannot be read."""

    flat = batch(1)
    given = []

    def savez(file, **arrays):
        given.append(set(arrays))
        return original(file, **arrays)

    original = np.savez
    monkeypatch.setattr(np, "savez", savez)
    write_dump(tmp_path / "step_1", flat, run_config(tmp_path, tmp_path), {"format_version": 1})
    assert given == [set(flat.to_arrays())]
    assert set(read_dump(tmp_path / "step_1").flat.to_arrays()) == set(flat.to_arrays())


def test_a_damaged_dump_is_refused_by_name(single_process, model_folder, tmp_path):
    with pytest.raises(DataError, match=r"has no batch\.npz: expected a folder such as"):
        read_dump(tmp_path)
    build(tmp_path, model_folder, single_process).train_step(batch(1, bad=math.nan), 1)
    folder = tmp_path / "run" / "bad_steps" / "step_1"
    (folder / "batch.npz").write_bytes(b"PK not a zip")
    with pytest.raises(DataError, match="step_1 cannot be read"):
        read_dump(folder)


def test_a_mismatch_above_the_limit_stops_the_run_with_its_size(single_process, model_folder, tmp_path):
    flat = batch(1)
    measured = (
        build(tmp_path / "a", model_folder, single_process).train_step(flat, 1).metrics["logprob_diff_mean"]
    )
    allowed = build(tmp_path / "b", model_folder, single_process, mismatch_abort=measured * 1.01)
    allowed.train_step(flat, 1)
    strict = build(tmp_path / "c", model_folder, single_process, mismatch_abort=measured * 0.99)
    with pytest.raises(
        MismatchError, match=r"step 1: logprob_diff_mean is .*more than policy\.mismatch_abort"
    ):
        strict.train_step(flat, 1)
