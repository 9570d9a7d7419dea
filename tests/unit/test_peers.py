"""Who can form a group for weights: found from published versions and reported devices, before anybody joins."""

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers.fake_memory import FakeMemory, running
from helpers.models import save_tiny_model
from helpers.runs import run_config

from megatron_laser.config import ConfigError
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.endpoints import ServerEndpoint
from megatron_laser.run.engines import open_engine
from megatron_laser.weight_sync import sync_weights
from megatron_laser.weight_sync.distributed import DistributedTransport
from megatron_laser.weight_sync.peers import Peers

SETTINGS = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}


def member(
    number=1, *, device="cuda", torch_version="2.13.0+cu129", nccl_version="2.27.3", nccl_settings=SETTINGS
):
    url = f"http://10.0.0.{number}:30000"
    endpoint = ServerEndpoint(
        url, torch_version=torch_version, nccl_version=nccl_version, nccl_settings=nccl_settings
    )
    return SimpleNamespace(url=url, device=device, endpoint=endpoint)


def peers(nccl_version="2.27.3", environment=SETTINGS):
    return Peers(torch_version="2.13.0+cu129", nccl_version=nccl_version, environment=environment)


def test_one_nccl_version_comes_together():
    assert peers().backend([member(), member(2)]) == "nccl"


@pytest.mark.parametrize("theirs", ["2.27.5", "2.27.12", "2.26.3", "2.28.3", "3.27.3", "strange"])
def test_another_nccl_is_refused_with_both_versions_and_what_to_do(theirs):
    servers = [member(1), member(2, nccl_version=theirs, torch_version="2.9.1")]
    with pytest.raises(ConfigError) as error:
        peers().backend(servers)
    message = str(error.value)
    for part in ("10.0.0.2", f"NCCL {theirs}", "torch 2.9.1", "NCCL 2.27.3", "torch 2.13.0+cu129"):
        assert part in message
    assert "rollout.sglang.python" in message and "weight_sync: disk" in message
    assert "10.0.0.1:" not in message


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (
            {},
            [
                "NCCL_CUMEM_ENABLE is 0 in the servers and not set in the trainer",
                "export NCCL_CUMEM_ENABLE=0",
            ],
        ),
        ({"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}, ["is 0 in the servers and 1 in the trainer"]),
        ({"NCCL_CUMEM_ENABLE": "0"}, ["NCCL_NVLS_ENABLE is 0 in the servers and not set"]),
    ],
)
def test_settings_that_map_memory_in_two_ways_are_refused_once_with_both_values(ours, said):
    with pytest.raises(ConfigError) as error:
        peers(environment=ours).backend([member(1), member(2)])
    message = str(error.value)
    assert all(part in message for part in said)
    assert message.count("NCCL_CUMEM_ENABLE is 0 in the servers") <= 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_group_of_which_one_side_checks_collectives_is_refused(device):
    environment = SETTINGS | {"TORCH_DISTRIBUTED_DEBUG": "detail"}
    with pytest.raises(ConfigError, match=r"TORCH_DISTRIBUTED_DEBUG=DETAIL .* would hang; unset it"):
        peers(environment=environment).backend([member(device=device)])
    assert peers(environment=SETTINGS | {"TORCH_DISTRIBUTED_DEBUG": "INFO"}).backend([member()]) == "nccl"


def test_of_a_server_by_url_nothing_is_known_and_that_is_said_once(caplog):
    group = peers()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            found = member(nccl_version=None, torch_version=None, nccl_settings=None)
            assert group.backend([found]) == "nccl"
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "must be 2.27.3, the trainer's" in said[0]
    assert "NCCL_CUMEM_ENABLE" in said[0]


def test_gloo_takes_another_torch_and_says_so_once(caplog):
    group = Peers(torch_version="2.13.0+cpu", nccl_version=None)
    servers = [member(device="cpu", torch_version="2.12.1+cpu", nccl_version=None)]
    with caplog.at_level(logging.INFO):
        assert group.backend(servers) == group.backend(servers) == "gloo"
    assert [record.message for record in caplog.records if "2.12.1" in record.message] == [
        "server http://10.0.0.1:30000 has torch 2.12.1+cpu, the trainer 2.13.0+cpu; gloo takes both"
    ]


def test_a_trainer_on_gpus_reaches_servers_on_cpus_by_gloo():
    assert peers().backend([member(device="cpu", nccl_version=None)]) == "gloo"


def test_servers_on_unlike_devices_are_refused():
    with pytest.raises(ConfigError, match="servers on CPUs and on GPUs cannot take one broadcast"):
        peers().backend([member(1), member(2, device="cpu")])


def test_a_trainer_without_gpu_cannot_broadcast_to_one():
    with pytest.raises(ConfigError, match="computes on a GPU and the trainer on a CPU"):
        Peers(torch_version="2.13.0", nccl_version=None).backend([member()])


def test_nobody_is_asked_to_join_when_the_group_cannot_be():
    """The server's own word about its device counts, whatever the settings say."""
    server = FakeMemory(device="cuda")
    with running(server):
        transport = DistributedTransport(
            peers=Peers(torch_version="2.13.0", nccl_version="2.27.3"),
            dtype=torch.float32,
            bucket_bytes=100,
            seconds=10.0,
            address=None,
            flattened=True,
            always_verify=False,
        )
        engine = SglangEngine(
            lambda: [ServerEndpoint(server.url, nccl_version="2.21.5")],
            api_key=None,
            expected=Expected(28, None, "float32"),
            transport=transport,
        )
        try:
            with pytest.raises(
                ConfigError, match=r"has NCCL 2\.21\.5 \(torch unknown\), the trainer NCCL 2\.27\.3"
            ):
                sync_weights(iter([("a", torch.ones(2))]), engine, 0)
        finally:
            engine.close()
    assert server.log == ["continue_generation", "pause_generation", "flush_cache"]


@pytest.fixture
def run(tmp_path):
    """A run with servers by URL whose settings say nothing of their device (the default is a GPU)."""
    save_tiny_model(tmp_path / "model", "qwen2")

    def make(url):
        rollout = {"engine": "sglang", "sglang": {"urls": [url], "start_deadline": 20}}
        return run_config(tmp_path, tmp_path / "model", rollout=rollout)

    return make


def test_servers_by_url_are_asked_for_their_device(run):
    server = FakeMemory(device="cpu", vocab_size=250)
    with running(server):
        engine = open_engine(run(server.url))
        try:
            (found,) = engine.fleet.members
            assert engine.transport.peers.backend([found]) == "gloo"
        finally:
            engine.close()


def test_a_server_that_can_never_be_reached_is_refused_when_the_engine_is_opened(run):
    server = FakeMemory(device="cuda", vocab_size=250)
    with running(server), pytest.raises(ConfigError, match="computes on a GPU and the trainer on a CPU"):
        open_engine(run(server.url))
    assert server.log == []
