"""The GPU environment: its pins agree with each other and with setup.py, and its set-up script says what is missing."""

import importlib.util
import os
import subprocess
import sys

import pytest
from helpers.executables import write_executable
from helpers.source_tree import ROOT
from packaging.requirements import Requirement

SCRIPT = ROOT / "tools" / "setup_gpu.sh"


def tool(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", ROOT / "tools" / "gpu" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


resolve, check = tool("resolve"), tool("check")
PINNED = resolve.read_constraints()


def setup(*arguments, **variables):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | variables,
    )


def test_the_pins_are_one_torch_and_one_nccl():
    assert resolve.problems(PINNED) == []
    assert sum(name == "torch" for name in PINNED) == 1
    assert "nvidia-nccl-cu12 2.27.7" in resolve.problems(PINNED | {"nvidia-nccl-cu12": "2.27.7"})[0]
    assert resolve.problems({}) != []


def test_the_pins_satisfy_setup_py_and_the_requirements():
    lines = [line.split("#")[0].strip() for line in resolve.REQUIREMENTS.read_text().splitlines()]
    wanted = [Requirement(line) for line in [*lines, *resolve.own_requirements()] if line]
    assert {"torch", "megatron-core", "transformer-engine", "triton", "pyarrow"} <= {
        item.name for item in wanted
    }
    for item in wanted:
        version = PINNED[resolve.canonical(item.name)]
        assert item.specifier.contains(version), f"{item} and {version} of constraints.txt"


def ask_index(*arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/gpu/resolve.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
    )
    if done.returncode == resolve.NO_INDEX:
        pytest.skip(f"no package index: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines() if not line.endswith(" packages"))
    assert found == {name: PINNED[name] for name in found}
    return set(found)


@pytest.mark.slow
@pytest.mark.long
def test_what_sglang_torch_and_the_others_require_of_each_other_is_what_is_pinned():
    """pip reads the metadata of some 40 packages, and downloads none of them."""
    assert {"torch", "transformer-engine", "sglang", "megatron-core", "triton"} <= ask_index("--direct")


@pytest.mark.long
def test_an_index_resolves_both_requirement_sets_to_the_pins():
    """One to two minutes: all 240 packages."""
    assert {"torch", "nvidia-nccl-cu13", "transformer-engine-cu13", "sglang", "megatron-core"} <= ask_index()


def test_a_requirement_that_the_pins_do_not_keep_is_named():
    def item(name, *requires):
        return {"metadata": {"name": name, "version": "1", "requires_dist": list(requires)}}

    pinned = {"torch": "2.14.1", "nvidia-nccl-cu13": "2.30.7"}
    keeps = item("a", "torch==2.14.1", "other; extra == 'x'", "older; python_version < '3.12'")
    assert resolve.disagreements([keeps], pinned) == []
    (said,) = resolve.disagreements([item("torch", "nvidia-nccl-cu13==2.27.7")], pinned)
    assert "torch 1 requires nvidia-nccl-cu13==2.27.7, pinned is 2.30.7" in said


def facts():
    names = (*check.EXACT, "apex")
    found = {name: PINNED.get(name, "not installed") for name in names}
    return found | {
        "torch": f"{PINNED['torch']}+cu130",
        "transformer-engine-torch": PINNED["transformer-engine"],
        "cuda": "13.0",
        "nccl": PINNED["nvidia-nccl-cu13"],
    }


NCCL = {"nvidia-nccl-cu13": PINNED["nvidia-nccl-cu13"]}


def test_the_pinned_environment_passes_the_check():
    assert check.problems(facts(), PINNED, NCCL) == []


@pytest.mark.parametrize(
    ("fact", "value", "says"),
    [
        ("torch", "2.9.0a0+abc", "torch is 2.9.0a0"),
        ("nccl", "2.30.4", "LD_LIBRARY_PATH"),
        ("cuda", "12.8", "expected 13"),
        ("transformer-engine", "2.20.2, fails to import: OSError: x", "fails to import"),
        ("transformer-engine-torch", "not installed", "built against this torch"),
        ("pyarrow", "26.0.1, fails to import: ImportError: NumPy", "pyarrow is"),
    ],
)
def test_a_difference_is_named(fact, value, says):
    (problem,) = check.problems(facts() | {fact: value}, PINNED, NCCL)
    assert says in problem


def test_two_nccl_packages_fail_the_check():
    (problem,) = check.problems(facts(), PINNED, NCCL | {"nvidia-nccl-cu12": "2.27.7"})
    assert "nvidia-nccl-cu12" in problem


def test_a_dry_run_prints_every_step_and_makes_nothing(tmp_path):
    done = setup("--dry-run", "--venv", str(tmp_path / "env"))
    assert done.returncode == 0, done.stderr
    for step in ("machine", "venv", "packages", "transformer-engine", "package", "check"):
        assert f"set-up: {step}\n" in done.stdout
    assert "NVTE_PYTORCH_FORCE_BUILD=TRUE" in done.stdout
    assert not (tmp_path / "env").exists()


def test_an_nvidia_smi_that_fails_is_no_driver_and_a_relative_folder_is_found_from_anywhere(tmp_path):
    said = "Failed to initialize NVML: Driver/library version mismatch"
    write_executable(tmp_path / "nvidia-smi", f"echo {said}\nexit 18")
    done = setup("--dry-run", "--only", "machine", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert f"nvidia-smi finds no driver ({said})" in done.stderr and "line" not in done.stderr
    done = setup("--dry-run", "--only", "transformer-engine", "--venv", "env")
    assert f"CPATH={os.getcwd()}/env/lib" in done.stdout


def test_what_a_machine_lacks_is_named_before_anything_is_installed(tmp_path):
    for name, text in {
        "nvidia-smi": "echo 550.54.15",
        "nvcc": "echo 'Cuda compilation tools, release 12.4, V12.4.131'",
    }.items():
        write_executable(tmp_path / "bin" / name, text)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = setup(
        "--venv",
        str(tmp_path / "env"),
        PATH=path,
        CUDA_HOME=str(tmp_path),
        PYTHON="/none",
        CXX="no-such-compiler",
    )
    assert done.returncode == 1
    for says in (
        "driver 550.54.15 is too old for CUDA 13; install 580 or newer",
        "of CUDA 12; install the CUDA 13 toolkit",
        "no C++ compiler (no-such-compiler)",
        "PYTHON=/none is not Python 3.12",
    ):
        assert says in done.stderr
    assert not (tmp_path / "env").exists()


def test_a_step_is_not_done_twice_and_a_wrong_option_is_refused(tmp_path):
    write_executable(tmp_path / "env" / "bin" / "python", f"echo once >>{tmp_path}/log")
    for said in ("packages: ", "packages: done before"):
        done = setup("--only", "packages", "--venv", str(tmp_path / "env"))
        assert done.returncode == 0 and said in done.stdout, done.stderr
    assert (tmp_path / "log").read_text() == "once\n"
    for wrong in ("everything", "machine venv"):
        assert "expected one of machine venv" in setup("--only", wrong).stderr
    assert "is no option" in setup("--all").stderr
    assert "--dry-run" in setup("--help").stdout


def test_a_step_that_fails_ends_the_set_up_and_is_done_again(tmp_path):
    write_executable(tmp_path / "env" / "bin" / "python", "exit 7")
    done = setup("--only", "packages", "--venv", str(tmp_path / "env"))
    assert done.returncode == 1 and "packages did not work" in done.stderr
    assert not (tmp_path / "env" / ".done-packages").exists()
