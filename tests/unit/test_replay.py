"""`megatron-laser replay` runs a dumped batch alone and shows where its numbers go wrong."""

import math
import shutil

import pytest
import torch
import yaml
from helpers.models import save_tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import ModelFolderError
from megatron_laser.data import DataError
from megatron_laser.model import platform

platform.install()

from megatron_laser.distributed import runtime  # noqa: E402
from megatron_laser.run.replay import replay  # noqa: E402
from megatron_laser.trainer.checkpoint.manager import CheckpointManager  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

GROUPS = [[Response(5, True), Response(7, False)], [Response(4, False, True), Response(6, True)]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that saved a checkpoint at step 1 and skipped two batches: folder of bad_steps/.

    Step 2 has an engine log-prob of NaN; step 3 a gradient of inf, because the weights were spoilt.
    """
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("replay")
    save_tiny_model(folder / "model", "qwen2")
    config = run_config(
        folder,
        folder / "model",
        laser={"score_token": SCORE_TOKEN, "reasoning_warmup_steps": 0},
        policy={"old_logprobs": "rollout", "minibatches": 2},
        rollout={"prompts_per_step": 2, "samples_per_prompt": 2},
    )
    here = runtime.start(config)
    trainer = Trainer(config, here, score_token_id=SCORE_TOKEN)
    trainer.train_step(rollout_batch(GROUPS, seed=1), 1)
    manager = CheckpointManager(config, here, trainer.policy)
    manager.save(1, {})
    assert manager.wait()
    bad = rollout_batch(GROUPS, seed=2)
    bad.rollout_logprobs[7] = math.nan
    trainer.train_step(bad, 2)
    norm = next(
        p for name, p in trainer.policy.chunks.models[0].named_parameters() if "final_layernorm" in name
    )
    norm.data[3] = math.inf
    trainer.train_step(rollout_batch(GROUPS, seed=3), 3)
    runtime.stop()
    return folder / "run"


def test_a_batch_with_a_bad_engine_logprob_is_bad_again_and_the_token_is_named(run):
    result = replay(run / "bad_steps" / "step_2")
    text = "\n".join(result.lines)
    assert result.bad
    assert "epoch 0, minibatch 0: skipped: policy_loss, total_loss not finite" in text
    assert "epoch 0, minibatch 1: taken" in text
    assert "checkpoints/step_00000001" in text
    assert "sample 1 (group 0): the engine's log-prob is nan at response token 2 (id " in text
    for term in ("policy_loss", "self_reward_loss", "entropy", "total_loss", "grad_norm"):
        assert f"  {term} " in text


@pytest.mark.parametrize("weights", ["checkpoint", "hugging face"])
def test_a_batch_that_was_bad_because_of_the_weights_is_fine_with_others(run, weights):
    folder = {"checkpoint": run / "checkpoints" / "step_00000001", "hugging face": run.parent / "model"}[
        weights
    ]
    result = replay(run / "bad_steps" / "step_3", folder)
    assert not result.bad
    assert result.lines[-1] == "result: every loss and gradient is finite"
    assert "  none in log-probs and scores" in result.lines
    assert any(str(folder) in line for line in result.lines)


def test_weights_that_overflow_show_in_every_samples_first_logprob_and_score(run, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.parent / "model")
    model.model.norm.weight.data[:] = 3e38  # finite, and infinity minus infinity in every logit
    model.save_pretrained(tmp_path / "spoilt")
    result = replay(run / "bad_steps" / "step_3", tmp_path / "spoilt")
    faults = [line for line in result.lines if line.startswith("  sample ")]
    assert result.bad and len(faults) == 4
    assert all("the log-prob is nan at response token 0" in line for line in faults)
    assert sum("the score token's log-prob is nan" in line for line in faults) == 3  # one is truncated


def test_weights_that_are_not_finite_are_refused_by_their_name(run, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.parent / "model")
    model.model.norm.weight.data[3] = math.nan
    model.save_pretrained(tmp_path / "spoilt")
    with pytest.raises(ModelFolderError, match=r"'model\.norm\.weight' holds NaN"):
        replay(run / "bad_steps" / "step_3", tmp_path / "spoilt")


def test_the_command_exits_with_1_when_the_batch_is_bad_again_and_2_for_what_is_no_dump(run, tmp_path):
    runner = CliRunner()
    bad = runner.invoke(app, ["replay", str(run / "bad_steps" / "step_2")])
    assert bad.exit_code == 1 and "result: bad again" in bad.output
    good = runner.invoke(
        app, ["replay", str(run / "bad_steps" / "step_3"), "--weights", str(run.parent / "model")]
    )
    assert good.exit_code == 0
    assert runner.invoke(app, ["replay", str(tmp_path)]).exit_code == 2


def test_a_sequence_that_context_ranks_shared_fits_the_one_process(run, tmp_path):
    dump = shutil.copytree(run / "bad_steps" / "step_3", tmp_path / "step_3")
    trained = yaml.safe_load((dump / "config.yaml").read_text())
    trained["parallel"]["context"] = 2
    trained["batching"]["tokens_per_micro_batch"] = 64  # the longest sequence is 64 + 64
    (dump / "config.yaml").write_text(yaml.safe_dump(trained))
    result = replay(dump, run.parent / "model")
    assert result.lines[-1] == "result: every loss and gradient is finite"


def test_weights_that_are_none_are_refused(run, tmp_path):
    with pytest.raises(DataError, match="expected a Hugging Face folder"):
        replay(run / "bad_steps" / "step_2", tmp_path)
