"""Checkpoints of models with experts on one process: converted both ways, resumed, refused, with frozen routers."""

import json

import pytest
import torch
from helpers.breadth import combinations
from helpers.models import disk_tensors, save_tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from test_convert import Run
from transformers import AutoModelForCausalLM

from megatron_laser.cli.conversion import convert
from megatron_laser.model.hf_folder import HfFolder
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.trainer import Trainer

FAMILIES = ["qwen3-moe", "qwen3-moe-unnormalised", "mixtral"]
ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight")


@pytest.fixture
def folder(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3-moe")
    return tmp_path


def assert_equal(theirs, ours):
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


@combinations(
    lambda family, dtype: (family, dtype) in (("qwen3-moe", "bfloat16"), ("mixtral", "float32")),
    family={family: family for family in FAMILIES},
    dtype={"float32": "float32", "bfloat16": "bfloat16"},
)
def test_what_transformers_loads_equals_the_trained_model(single_process, tmp_path, family, dtype):
    save_tiny_model(tmp_path / "model", family)
    run = Run(single_process, tmp_path, f"model.dtype={dtype}")
    before = run.weights()
    run.train(1)
    target = convert(run.saved(), tmp_path / "new" / "hf")
    trained = run.weights()
    unchanged = [name for name in before if torch.equal(before[name], trained[name])]
    assert dtype == "bfloat16" or not [name for name in unchanged if name.endswith(ROUTERS)]
    model = AutoModelForCausalLM.from_pretrained(target, local_files_only=True)
    assert model.dtype == getattr(torch, dtype)
    loaded = disk_tensors(model)
    assert_equal({name: tensor for name, tensor in loaded.items() if name in trained}, trained)
    with HfFolder(target) as written:
        assert set(written.names()) == set(trained)


@combinations(
    lambda family: family != "qwen3-moe-unnormalised", family={family: family for family in FAMILIES}
)
def test_training_from_a_converted_folder_is_training_from_the_folder(single_process, tmp_path, family):
    save_tiny_model(tmp_path / "model", family)
    expected = Run(single_process, tmp_path).train(1)
    checkpoint = convert(tmp_path / "model", tmp_path / "run" / "checkpoints", dtype="float32")
    back = convert(checkpoint, tmp_path / "back", model=tmp_path / "model")
    with HfFolder(tmp_path / "model") as one, HfFolder(back) as other:
        assert set(one.names()) == set(other.names())
        assert all(torch.equal(one.full(name), other.full(name)) for name in one.names())
    again = Run(single_process, tmp_path)
    assert again.checkpoints.resume()["step"] == 0
    found = again.train(1)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts": 16}, "experts.num_experts 8 there, 16 here"),
        ({"num_experts_per_tok": 3}, "experts.experts_per_token 2 there, 3 here"),
        ({"moe_intermediate_size": 32}, "experts.intermediate_size 24 there, 32 here"),
        ({"norm_topk_prob": False}, "experts.normalised true there, false here"),
    ],
)
def test_a_model_with_other_experts_is_named_and_not_resumed(single_process, folder, changes, said):
    saved = Run(single_process, folder).saved()
    save_tiny_model(folder / "other", "qwen3-moe", **changes)
    config = run_config(folder, folder / "other", "checkpoint.every=1")
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    with pytest.raises(CheckpointError, match=said):
        CheckpointManager(config, single_process, trainer.policy).resume()
    with pytest.raises(CheckpointError, match=said):
        convert(saved, folder / "hf", model=folder / "other")


@combinations(
    lambda optimizer, dtype: (optimizer, dtype) == ("distributed", "bfloat16"),
    distributed={"plain": False, "distributed": True},
    dtype={"float32": "float32", "bfloat16": "bfloat16"},
)
def test_frozen_routers_are_saved_resumed_and_exported_as_they_were(
    single_process, folder, distributed, dtype
):
    settings = [
        "moe.freeze_router=true",
        f"optimizer.distributed={str(distributed).lower()}",
        f"model.dtype={dtype}",
    ]
    run = Run(single_process, folder, *settings)
    start = run.weights()
    run.train(1)
    saved = run.saved()
    expected = run.train(2)
    again = Run(single_process, folder, *settings)
    assert again.checkpoints.resume()["step"] == 1
    found = again.train(2)
    assert found["grad_norm"] == expected["grad_norm"]
    with HfFolder(convert(saved, folder / "hf")) as exported:
        for name, tensor in start.items():
            assert torch.equal(found[name], expected[name]), name
            frozen = name.endswith(ROUTERS)
            assert not frozen or torch.equal(found[name], tensor), name
            assert not frozen or torch.equal(exported.full(name), tensor), name


def test_a_batch_of_one_token_responses_reaches_few_experts_and_trains(single_process, folder):
    run = Run(single_process, folder)
    before = run.weights()
    flat = rollout_batch([[Response(1, True), Response(1, False, truncated=True)]], seed=3)
    metrics = run.trainer.train_step(flat, 1).metrics
    assert 0 < metrics["experts_idle"] < 1 and json.dumps(metrics["grad_norm"]) != "NaN"
    assert any(not torch.equal(before[name], tensor) for name, tensor in run.weights().items())
