"""Which weight syncs two environments allow: from versions and settings, as `env` says it and the trainer checks it."""

import ctypes
from dataclasses import replace

import pytest

from megatron_laser.rollout.nccl import loaded_version, server_settings, setting_problems, trainer_settings
from megatron_laser.weight_sync.feasibility import SyncSide, sync_feasibility

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
