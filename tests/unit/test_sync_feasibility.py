"""Which weight syncs two environments allow: from versions and settings, as `env` says it and the trainer checks it."""

import ctypes
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
from helpers.runs import run_config

from megatron_laser.config import ConfigError
from megatron_laser.rollout.endpoints import Endpoints, ServerEndpoint, publish
from megatron_laser.rollout.nccl import loaded_version, server_settings, setting_problems, trainer_settings
from megatron_laser.rollout.servers import installed
from megatron_laser.rollout.servers.installed import Installed
from megatron_laser.weight_sync import feasibility
from megatron_laser.weight_sync.feasibility import SyncSide, check_servers, sync_feasibility

OFF = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
TRAINER = SyncSide("2.14.1+cu130", "2.30.7", OFF)
SERVERS = SyncSide("2.14.1", "2.30.7", OFF, "/env/bin/python")


def test_one_environment_can_do_all_of_it():
    found = sync_feasibility(TRAINER, SERVERS, {})
    assert found == {"distributed": None, "colocated": None, "disk": None}


def test_gloo_takes_two_releases_of_torch_and_memory_does_not():
    found = sync_feasibility(SyncSide("2.13.0+cpu", None), SyncSide("2.14.1+cpu", None), {})
    assert found["distributed"] is None and found["disk"] is None
    assert "torch 2.14.1+cpu in the servers' environment" in found["colocated"]


@pytest.mark.parametrize(
    ("trainer", "servers", "environment", "kind", "reason"),
    [
        ({"nccl": "2.30.4"}, {}, {}, "distributed", "NCCL 2.30.7 in the servers and 2.30.4 in the trainer"),
        ({"nccl": None}, {}, {}, "distributed", "NCCL 2.30.7 in the servers and (none) in the trainer"),
        ({"settings": {}}, {}, {}, "distributed", "export NCCL_CUMEM_ENABLE=0"),
        ({}, {}, {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, "distributed", "DETAIL"),
        ({}, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "colocated", "expandable segments"),
        ({}, {}, {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "colocated", "16 ranks, of which 8"),
    ],
)
def test_what_speaks_against_a_kind_is_said_of_that_kind_only(trainer, servers, environment, kind, reason):
    found = sync_feasibility(replace(TRAINER, **trainer), replace(SERVERS, **servers), environment)
    assert reason in found[kind]
    assert [name for name, text in found.items() if text is not None] == [kind]


def test_without_servers_nothing_works():
    assert all(
        "no environment with SGLang" in text
        for text in sync_feasibility(TRAINER, SyncSide(None, None), {}).values()
    )


@pytest.fixture
def on_gpus(monkeypatch, tmp_path):
    """The configuration of a run on a GPU with NCCL 2.30.7, whose servers' interpreter has `nccl`."""
    for name in OFF:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(feasibility, "trainer_nccl", lambda: "2.30.7")

    def of(nccl, *overrides, **sglang):
        theirs = Installed("0.5.23", None, "2.9.1", None if sglang.get("device") == "cpu" else nccl)
        monkeypatch.setattr(installed, "ask_installed", lambda python, nccl: theirs)
        rollout = {"engine": "sglang", "sglang": {"python": sys.executable} | sglang}
        return run_config(tmp_path, tmp_path / "model", *overrides, rollout=rollout)

    return of


def test_servers_with_another_nccl_are_refused_before_a_model_is_built(on_gpus, tmp_path, monkeypatch):
    check_servers(on_gpus("2.30.7"))
    with pytest.raises(
        ConfigError, match=r"rollout\.sglang\.python: .*has NCCL 2\.27\.7.*rollout\.weight_sync: disk"
    ):
        check_servers(on_gpus("2.27.7"))
    check_servers(on_gpus("2.27.7", "rollout.weight_sync=disk"))
    check_servers(on_gpus("2.27.7", device="cpu"))  # gloo
    with pytest.raises(ConfigError, match=r"NCCL_CUMEM_ENABLE is 0 in the servers and 1 in the trainer"):
        monkeypatch.setattr(
            feasibility, "trainer_settings", lambda environment: OFF | {"NCCL_CUMEM_ENABLE": "1"}
        )
        check_servers(on_gpus("2.30.7"))


def test_an_interpreter_without_sglang_is_refused_before_a_model_is_built(tmp_path):
    def config(**sglang):
        sglang = {"python": "/bin/false", "device": "cpu"} | sglang
        return run_config(tmp_path, tmp_path / "model", rollout={"engine": "sglang", "sglang": sglang})

    with pytest.raises(ConfigError, match=r"rollout\.sglang\.python: /bin/false does not run: exit status 1"):
        check_servers(config())
    check_servers(config(urls=["http://10.0.0.5:30000"]))  # somebody else's


@pytest.mark.parametrize(("age", "refused"), [(0.0, True), (3600.0, False)])
def test_servers_that_are_there_already_are_compared_by_what_they_publish(on_gpus, tmp_path, age, refused):
    file = tmp_path / "endpoints.json"
    config = on_gpus(None, endpoints=str(file))
    check_servers(config)  # not there yet
    servers = (
        ServerEndpoint("http://10.0.0.5:30000", nccl_version="2.27.7", nccl_settings=OFF),
        ServerEndpoint("http://10.0.0.6:30000"),  # says nothing
    )
    publish(file, Endpoints(servers, updated=time.time() - age))
    with (
        pytest.raises(ConfigError, match=r"10\.0\.0\.5:30000 has NCCL 2\.27\.7") if refused else nullcontext()
    ):
        check_servers(config)


# settings


@pytest.mark.parametrize(
    ("environment", "options", "cumem", "nvls"),
    [
        ({}, {}, "0", "0"),
        ({"NCCL_CUMEM_ENABLE": "1"}, {}, "1", "0"),
        ({"NCCL_CUMEM_ENABLE": " 0 ", "NCCL_NVLS_ENABLE": ""}, {"enable-nccl-nvls": True}, "0", "1"),
        ({"NCCL_CUMEM_ENABLE": "0"}, {"enable_symm_mem": True}, "1", "1"),
        ({}, {"enable-symm-mem": False}, "0", "0"),
    ],
)
def test_what_a_server_computes_with_is_what_sglang_makes_of_it(environment, options, cumem, nvls):
    found = server_settings(environment, options)
    assert found == {"NCCL_CUMEM_ENABLE": cumem, "NCCL_NVLS_ENABLE": nvls}
    assert setting_problems(found, found) == []


def test_a_trainer_that_sets_nothing_has_settings_of_nobody_knows_what():
    assert trainer_settings({"NCCL_CUMEM_ENABLE": "", "NCCL_DEBUG": "INFO"}) == {}
    assert len(setting_problems({}, OFF)) == 2
    assert setting_problems({}, {}) == []  # servers by URL publish nothing


# the loaded library


@pytest.mark.parametrize(("code", "version"), [(23007, "2.30.7"), (22712, "2.27.12"), (2809, "2.8.9")])
def test_the_version_is_that_of_the_loaded_library(tmp_path, monkeypatch, code, version):
    opened = []

    class Library:
        def __init__(self, path):
            opened.append(path)

        def ncclGetVersion(self, pointer):
            pointer._obj.value = code
            return 0

    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f10 r-xp 00000000 08:01 11  /opt/with space/nccl/libnccl.so.2\n"
        "7f10-7f20 r--p 00000000 08:01 11  /opt/with space/nccl/libnccl.so.2\n"
        "7f20-7f30 r-xp 00000000 08:01 12  /opt/libnccl-net.so\n7f30-7f40 rw-p 00000000 00:00 0\n"
    )
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert loaded_version(str(maps)) == version
    assert opened == ["/opt/with space/nccl/libnccl.so.2"]


def test_a_process_without_nccl_has_no_version(tmp_path):
    assert loaded_version(str(tmp_path / "nothing")) is None
    (tmp_path / "maps").write_text("7f00-7f10 r-xp 00000000 08:01 11  /lib/libc.so.6\n")
    assert loaded_version(str(tmp_path / "maps")) is None
