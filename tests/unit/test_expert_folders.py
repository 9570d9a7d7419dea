"""Model folders with experts that cannot be used: what is wrong is named in one line, wherever a folder is read."""

import json

import pytest
import torch
from helpers.models import save_tiny_model
from helpers.runs import SCORE_TOKEN, run_config
from safetensors.torch import load_file, save_file

from megatron_laser.cli.conversion import convert
from megatron_laser.config import ConfigError, ModelFolderError, check_model_folder
from megatron_laser.evaluation.weight_identity import FolderWeights, engine_digest
from megatron_laser.rollout.client.identify import Expected, mismatches
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.rollout.sglang_api import server_facts
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.weight_sync.buckets import buckets

WEIGHTS = "model.safetensors"
QWEN = "model.layers.1.mlp.experts.3."
MIXTRAL = "model.layers.2.block_sparse_moe.experts.7."


@pytest.fixture(scope="module", params=["qwen3-moe", "mixtral"])
def good(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    save_tiny_model(folder, request.param)
    return folder


@pytest.fixture
def qwen(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3-moe")
    return tmp_path / "model"


def changed(folder, *, without=(), tensors=None, config=None):
    """The folder after a change of its tensors or of its config.json."""
    weights = load_file(folder / WEIGHTS) | (tensors or {})
    for name in without:
        del weights[name]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    return folder


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3-moe", f"{QWEN}up_proj.weight"),
        ("qwen3-moe", "model.layers.0.mlp.gate.weight"),
        ("mixtral", f"{MIXTRAL}w2.weight"),
        ("mixtral", "model.layers.3.block_sparse_moe.gate.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named_by_every_command(single_process, tmp_path, family, name):
    save_tiny_model(tmp_path / "model", family)
    folder = changed(tmp_path / "model", without=[name])
    config = run_config(tmp_path, folder)
    for read in (
        lambda: check_model_folder(folder),
        lambda: convert(folder, tmp_path / "checkpoints"),
        lambda: InProcessEngine(folder, dtype=torch.float32, device=torch.device("cpu")),
        lambda: Trainer(config, single_process, score_token_id=SCORE_TOKEN),
    ):
        with pytest.raises(ModelFolderError, match="1 tensor missing from its safetensors files") as caught:
            read()
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"tensors": {f"{QWEN}down_proj.weight": torch.zeros(64, 12)}},
            f"{QWEN}down_proj.weight is [64, 12], expected [64, 24]",
        ),
        (
            {"tensors": {"model.layers.0.mlp.gate.weight": torch.zeros(9, 64)}},
            "model.layers.0.mlp.gate.weight is [9, 64], expected [8, 64]",
        ),
        ({"config": {"num_local_experts": 9}}, "model.layers.0.mlp.experts.8.gate_proj.weight"),
        ({"config": {"num_local_experts": 7}}, "model.layers.0.mlp.experts.7.down_proj.weight"),
        (
            {"tensors": {"model.layers.0.mlp.shared_expert.up_proj.weight": torch.zeros(2, 64)}},
            "model.layers.0.mlp.shared_expert.up_proj.weight",
        ),
    ],
    ids=["shape", "router", "fewer experts", "more experts", "a shared expert"],
)
def test_tensors_that_are_not_those_of_its_config_are_named(qwen, change, said):
    with pytest.raises(ModelFolderError) as caught:
        check_model_folder(changed(qwen, **change))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_two_numbers_of_experts_that_differ_are_refused(qwen):
    with pytest.raises(ConfigError, match="num_local_experts 8 and num_experts 6: expected the same number"):
        check_model_folder(changed(qwen, config={"num_experts": 6}))
    check_model_folder(changed(qwen, config={"num_experts": 8}))


def test_one_changed_expert_is_another_model(good, tmp_path):
    def identities(folder):
        weights = FolderWeights(folder)
        engine = InProcessEngine(folder, dtype=torch.float32, device=torch.device("cpu"))
        try:
            return weights.identity, engine_digest(engine), dict(engine.named_parameters())
        finally:
            weights.close()

    family = json.loads((good / "config.json").read_text())["model_type"]
    name = f"{MIXTRAL}w2.weight" if family == "mixtral" else f"{QWEN}down_proj.weight"
    before = identities(good)
    assert set(before[2]) == set(load_file(good / WEIGHTS))
    other = tmp_path / "other"
    save_tiny_model(other, "mixtral" if family == "mixtral" else "qwen3-moe")
    assert identities(other)[:2] == before[:2]
    after = identities(changed(other, tensors={name: before[2][name] * 2}))
    assert after[0] != before[0] and after[1] != before[1]


def test_a_server_of_a_model_with_other_experts_is_refused():
    facts = server_facts({"model_path": "m", "model_type": "qwen3_moe"}, {"version": "0.5.23"})
    config = {"vocab_size": 250, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    expected = Expected(250, "qwen3_moe", sizes=config)
    assert mismatches(facts, expected, config) == []
    (problem,) = mismatches(facts, expected, config | {"num_experts_per_tok": 4})
    assert "num_experts_per_tok 4 instead of 2" in problem


def test_thousands_of_small_tensors_fill_their_buckets():
    weights = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight", torch.zeros(32, 16))
        for layer in range(48)
        for expert in range(128)
        for part in ("gate", "up", "down")
    ]
    limit = 1_000_000
    found = list(buckets(iter(weights), limit))
    assert [name for bucket in found for name, _ in bucket.tensors] == [name for name, _ in weights]
    one = weights[0][1].nbytes
    assert all(bucket.nbytes == limit // one * one for bucket in found[:-1])
    assert len(found) == -(-len(weights) // (limit // one))
