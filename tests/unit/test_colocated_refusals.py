"""What `rollout.weight_sync: colocated` cannot do is said before a model is built or a server is started."""

import pytest
import torch
from helpers.fake_sglang import fake_python
from helpers.models import save_tiny_model
from helpers.runs import run_config

from megatron_laser.config import ConfigError, check_settings, resolve_plan
from megatron_laser.config.checks.rollout import colocated_layout_problems
from megatron_laser.rollout.servers.start_checks import (
    different_torch,
    expandable_segments,
    refuse_colocated,
    several_nodes,
)
from megatron_laser.run.inputs import read_inputs

OURS = torch.__version__


@pytest.fixture
def config(tmp_path):
    def make(*, torch_version=OURS, **rollout):
        sglang = {"python": fake_python(tmp_path / "environment", torch_version=torch_version)}
        sglang |= rollout.pop("sglang", {})
        settings = {"engine": "sglang", "weight_sync": "colocated", "sglang": sglang, **rollout}
        return run_config(tmp_path, tmp_path / "model", rollout=settings, policy={"importance_cap": 2.0})

    return make


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_fitting_environment_passes(config):
    refuse_colocated(config())


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize(
    "value", ["expandable_segments:True", "max_split_size_mb:64, expandable_segments : true"]
)
def test_expandable_segments_are_refused_under_both_names(config, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"colocated with {name}=.*unset it"):
        refuse_colocated(config())
    refuse_colocated(config(weight_sync="distributed"))


@pytest.mark.parametrize("sglang", [{"servers": 2}, {"tensor": 2}])
def test_handles_that_would_cross_gpus_are_refused(config, sglang):
    with pytest.raises(
        ConfigError, match=r"= 2 GPUs: weights lie on rank 0's GPU, .* use one GPU for both sides"
    ):
        refuse_colocated(config(sglang={"device": "cuda", **sglang}))
    refuse_colocated(config(sglang={"device": "cpu", **sglang}))  # shared memory has no device
    refuse_colocated(config(sglang={"device": "cuda"}))


def test_other_allocator_settings_pass():
    assert expandable_segments({"PYTORCH_ALLOC_CONF": "expandable_segments:False,max_split_size_mb:64"}) == []


@pytest.mark.parametrize("theirs", ["2.1.0", "-"])
def test_another_torch_in_the_servers_environment_is_refused(config, theirs):
    with pytest.raises(ConfigError) as error:
        refuse_colocated(config(torch_version=theirs))
    message = str(error.value)
    assert f"torch {OURS}" in message and "install the same torch in both" in message
    assert f"torch {theirs if theirs != '-' else '(none)'}" in message
    refuse_colocated(config(torch_version=theirs, weight_sync="disk"))


def test_builds_of_one_release_are_alike():
    assert different_torch("2.13.0+cu129", "2.13.0", "python") == []
    assert different_torch("2.13.0+cu129", "2.13.1+cu129", "python") != []


def test_a_trainer_on_two_nodes_is_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="16 ranks, of which 8 are on this node"):
        refuse_colocated(config())
    assert several_nodes({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}) == []


def test_all_problems_are_named_at_once_and_nothing_is_claimed(config, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    wrong = config(torch_version="2.1.0")
    with pytest.raises(ConfigError) as error:
        read_inputs(wrong)
    assert len(error.value.problems) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("servers", "tensor", "ranks", "fits"),
    [(8, 1, 8, True), (2, 4, 8, True), (4, 1, 8, False), (1, 1, 8, False)],
)
def test_servers_have_as_many_gpus_as_the_trainer(config, servers, tensor, ranks, fits):
    rollout = config(sglang={"servers": servers, "tensor": tensor}).rollout
    problems = colocated_layout_problems(rollout, ranks)
    assert bool(problems) is not fits
    for problem in problems:
        assert f"= {servers * tensor} GPUs and {ranks} trainer ranks" in problem
    assert colocated_layout_problems(config(sglang={"servers": 3, "device": "cpu"}).rollout, ranks) == []


def test_a_plan_without_a_world_size_takes_the_servers_gpus(config, tmp_path):
    save_tiny_model(tmp_path / "model", "qwen2")
    fits = config(sync_deadline=50, sglang={"servers": 2, "tensor": 2})
    plan = resolve_plan(fits)
    assert plan.layout.data == 4
    with pytest.raises(ConfigError, match="= 4 GPUs and 2 trainer ranks"):
        resolve_plan(fits, 2)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"ahead": 1}, "colocated with rollout.ahead: 1"),
        (
            {"sglang": {"urls": ["http://10.0.0.1:1"]}},
            "colocated with rollout.sglang.urls, endpoints or router",
        ),
        ({"sglang": {"endpoints": "servers"}}, "colocated with rollout.sglang.urls, endpoints or router"),
        ({"sglang": {"router": True}}, "colocated with rollout.sglang.urls, endpoints or router"),
    ],
)
def test_settings_that_cannot_share_a_gpu_are_refused(config, rollout, message):
    with pytest.raises(ConfigError) as error:
        check_settings(config(**rollout))
    assert message in str(error.value)
