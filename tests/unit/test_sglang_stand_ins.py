"""The stand-ins of the CPU environment: what SGLang uses works, everything else fails loudly."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from helpers.sglang_server import sglang_python
from helpers.source_tree import ROOT

PARTS = ROOT / "tools" / "sglang_cpu"


def load(name, monkeypatch):
    """The stand-in as `stand_in_NAME`, so that a real package of this environment is left alone."""
    spec = importlib.util.spec_from_file_location(
        f"stand_in_{name}", PARTS / "stand_ins" / name / "__init__.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_new_cache_slots_are_entered_where_each_request_goes_on(monkeypatch):
    kernel = load("sgl_kernel", monkeypatch)
    table = torch.zeros(3, 6, dtype=torch.int32)
    rows, starts, ends = torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([4, 2])
    kernel.assign_req_to_token_pool_cpu(rows, table, starts, ends, torch.tensor([7, 8, 9, 5, 6]), 6)
    assert table.tolist() == [[5, 6, 0, 0, 0, 0], [0] * 6, [0, 7, 8, 9, 0, 0]]


def test_pinning_host_memory_succeeds_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", torch.cuda.cudart)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    load("sgl_kernel", monkeypatch)
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(1, 2, 0)) == int(runtime.cudaHostUnregister(1)) == 0


def test_any_other_kernel_can_be_imported_and_not_called(monkeypatch):
    kernel = load("sgl_kernel", monkeypatch)
    with pytest.raises(RuntimeError, match=r"sgl_kernel\.rmsnorm is not in the stand-in"):
        kernel.rmsnorm(torch.zeros(2))
    assert not hasattr(kernel, "__wrapped__")  # what inspects a module is not misled


def test_torchvision_can_be_imported_and_not_used(monkeypatch):
    vision = load("torchvision", monkeypatch)
    transforms = sys.modules[f"{vision.__name__}.transforms"]
    assert transforms.InterpolationMode.BICUBIC.value == "bicubic"
    for use in (
        lambda: transforms.Resize(3),
        lambda: transforms.functional.to_tensor(1),
        lambda: vision.io.decode_jpeg.apply,
    ):
        with pytest.raises(RuntimeError, match="is not in the stand-in"):
            use()
    for name in [name for name in sys.modules if name.startswith(f"{vision.__name__}.")]:
        del sys.modules[name]


def test_every_package_that_is_installed_has_a_version():
    pinned = {line.split("==")[0].lower() for line in lines(PARTS / "constraints.txt")}
    wanted = {line.lower() for line in lines(PARTS / "requirements.txt")}
    assert {name.replace("_", "-") for name in wanted} <= {name.replace("_", "-") for name in pinned}
    assert {"torch", "sglang", "sglang-router", "xgrammar", "triton", "apache-tvm-ffi"} <= pinned


def lines(file):
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.sglang
def test_the_set_up_returns_at_once_when_nothing_has_changed():
    if not sglang_python().startswith(str(ROOT)):
        pytest.skip("MEGATRON_LASER_SGLANG_PYTHON names an environment that the set-up has not made")
    done = subprocess.run(
        ["bash", "tools/setup_sglang_cpu.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_set_up_refuses_what_it_does_not_know():
    done = subprocess.run(
        ["bash", "tools/setup_sglang_cpu.sh", "--fast"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "unknown argument" in done.stderr
