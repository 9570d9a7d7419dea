"""`megatron-laser env`: facts of interpreters, and what two environments mean for a run."""

import os
import subprocess
import sys

import pytest
from helpers.executables import write_executable
from helpers.source_tree import ROOT

from megatron_laser.cli import environment
from megatron_laser.cli.environment_facts import IMPORTED, collect

GPU = {
    "torch": "2.14.1+cu130",
    "cuda": "13.0",
    "nccl": "2.30.7",
    "sglang": "0.5.23",
    "python": "3.12.3 on Linux",
}
ALIKE = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}


def syncs(ours, theirs, variables=ALIKE, gpus=True):
    return environment.weight_syncs(ours, theirs, variables, "/opt/x/bin/python", gpus=gpus)


def script(folder, text):
    return write_executable(folder / "python", text)


def test_one_environment_can_sync_in_every_way():
    assert syncs(GPU, GPU) == dict.fromkeys(("distributed", "colocated", "disk"), "can work")
    assert environment.differences(GPU, GPU) == {}


def test_two_environments_say_which_kinds_are_left_and_why():
    theirs = GPU | {"torch": "2.9.0a0+abc", "nccl": "2.30.4"}
    found = syncs(GPU, theirs)
    assert found["disk"] == "can work"
    assert "2.30.4 in the servers and 2.30.7 in the trainer" in found["distributed"]
    assert found["colocated"].startswith("cannot work: ") and "2.9.0a0+abc" in found["colocated"]
    assert set(environment.differences(GPU, theirs)) == {"torch", "nccl"}


@pytest.mark.parametrize("theirs", [GPU | {"sglang": "not installed"}, {"error": "python does not run: no"}])
def test_servers_that_are_not_there_rule_out_every_kind(theirs):
    assert all(text.startswith("cannot work: ") for text in syncs(GPU, theirs).values())


def test_settings_of_nccl_and_the_allocator_count():
    assert "NCCL_CUMEM_ENABLE" in syncs(GPU, GPU, {})["distributed"]
    expandable = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert "expandable_segments" in syncs(GPU, GPU, ALIKE | expandable)["colocated"]


def test_the_version_of_nccl_is_found_where_this_package_is_not_installed(tmp_path):
    script = "import runpy, sys; print(runpy.run_path(sys.argv[1])['loaded_version']())"
    file = ROOT / "megatron_laser" / "rollout" / "nccl.py"
    bare = [sys.executable, "-I", "-S", "-c", script, file]  # -S: no installed packages
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "None", done.stderr


def test_a_variable_that_the_trainer_refuses_is_named_with_its_setting():
    found = environment.variables({"NVTE_FUSED_ATTN": "0", "NCCL_DEBUG": "INFO", "HOME": "/"})
    assert found["NCCL_DEBUG"] == "INFO" and "HOME" not in found
    assert "model.attention" in found["NVTE_FUSED_ATTN"]


def test_a_package_that_fails_to_import_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    found = collect()
    assert found["pyarrow"].startswith("1.0, fails to import: ModuleNotFoundError")
    assert set(IMPORTED) <= set(found)


def test_an_interpreter_that_fails_says_so_within_its_deadline(tmp_path):
    assert "does not run" in environment.ask(str(tmp_path / "none"), os.environ)["error"]
    assert "not here" in environment.ask(script(tmp_path, "echo not here >&2; exit 3"), os.environ)["error"]
    assert "exit status 1" in environment.ask("/bin/false", os.environ)["error"]
    assert "signal 11" in environment.ask(script(tmp_path, "kill -SEGV $$"), os.environ)["error"]
    slow = environment.ask(script(tmp_path, "exec sleep 60"), os.environ, deadline=0.2)
    assert "has not answered within 0.2 s" in slow["error"]


def test_gpus_are_those_of_nvidia_smi(tmp_path, monkeypatch):
    write_executable(tmp_path / "nvidia-smi", "echo '0, NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert environment.gpus() == {"driver": "580.95.05", "GPU 0": "NVIDIA H100 80GB HBM3, 81559 MiB"}


def test_the_command_prints_both_sides_and_every_kind_of_sync(tmp_path):
    """With a servers' interpreter that answers, but has no SGLang."""
    answer = '{"python": "3.12.3", "torch": "2.14.1+cu130", "nccl": "2.30.7", "sglang": "not installed"}'
    servers = script(tmp_path, f"echo '{answer}'")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_laser", "env", "--sglang-python", servers],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"NVTE_FLASH_ATTN": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for start in ("python", "torch ", "megatron-core", "pyarrow", "driver", "servers' interpreter"):
        assert any(line.startswith(start) for line in lines), start
    assert any(line.startswith("differs: torch") and "2.14.1+cu130 in the servers" in line for line in lines)
    syncs = [line for line in lines if line.startswith("weight_sync ")]
    assert len(syncs) == 3 and all("cannot work: no environment with SGLang" in line for line in syncs)
    assert "NVTE_FLASH_ATTN" in done.stdout and "model.attention" in done.stdout
