"""tools/compare_layouts.py: the parallel layout and the cut into micro-batches do not change what is learned."""

import subprocess
import sys

import pytest
from helpers.torchrun import ROOT, worker_environment

TOOL = ROOT / "tools" / "compare_layouts.py"


def compare(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        env=worker_environment(),
        timeout=280,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "processes"),
    [
        pytest.param(False, ("1", "2"), id="untied, 1 and 2 processes"),
        pytest.param(True, ("4",), id="tied, 4 processes"),
        pytest.param(True, ("1", "2"), id="tied, 1 and 2 processes", marks=pytest.mark.long),
        pytest.param(False, ("4",), id="untied, 4 processes", marks=pytest.mark.long),
    ],
)
def test_every_layout_learns_the_same(tied, processes):
    result = compare("--processes", *processes, *(["--tied"] if tied else []))
    assert result.returncode == 0, result.stdout[-6000:]
    for name in {
        "2": ("tensor 2, sequence", "pipeline 2 x virtual 2", "context 2"),
        "4": ("tensor 2 x pipeline 2", "context 4", "context 2 x tensor 2", "context 2 x pipeline 2"),
    }[processes[-1]]:
        assert any(line.startswith(f"{name} ") for line in result.stdout.splitlines()), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    ["gmpo", *(pytest.param(name, marks=pytest.mark.long) for name in ("gspo", "cispo", "sapo"))],
)
def test_losses_and_importance_of_whole_responses_are_the_same_in_every_layout(loss):
    only = ("data 2, 80 tokens", "tensor 2", "pipeline 2", "context 2, 80 tokens")
    result = compare("--processes", "2", "--loss", loss, "--only", *only)
    assert result.returncode == 0, result.stdout[-6000:]
    for name in only:
        assert any(line.startswith(f"{name} ") for line in result.stdout.splitlines()), name


@pytest.mark.distributed
@pytest.mark.slow
def test_interleaved_pipelines_of_uneven_chunks_learn_the_same():
    result = compare("--uneven")
    assert result.returncode == 0, result.stdout[-6000:]
    for chunks in ("2 + 1 + 1 + 2", "1 + 3 + 1 + 1", "2 + 2 + 1 + 1"):
        assert f"pipeline 2 x virtual 2 of {chunks} " in result.stdout


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "processes", [pytest.param(("2",), id="2"), pytest.param(("4",), id="4", marks=pytest.mark.long)]
)
def test_every_layout_of_experts_learns_the_same(processes):
    result = compare("--experts", "--processes", *processes)
    assert result.returncode == 0, result.stdout[-6000:]
    for name in {
        "2": ("expert 2", "expert tensor 2", "pipeline 2, recompute experts", "expert 2 within context 2"),
        "4": ("expert 2 x tensor 2", "expert 2 x data 2", "expert 2 x pipeline 2", "expert 2 x context 2"),
    }[processes[-1]]:
        assert any(line.startswith(f"{name} ") for line in result.stdout.splitlines()), name
