"""tools/compare_layouts.py: the parallel layout and the cut into micro-batches do not change what is learned.

One layout of each kind here, on ranks that begin with everything imported; all of them, as the tool is called, `long`.
"""

import subprocess
import sys

import pytest
from helpers.ranks import run_ranks
from helpers.torchrun import ROOT, worker_environment

sys.path.insert(0, str(ROOT / "tools"))
import compare_layouts

TOOL = ROOT / "tools" / "compare_layouts.py"
#: Of a case: the arguments, and the only layouts that are compared with the reference.
CORE = {
    "untied": (
        ["--processes", "2"],
        [
            "1 process, 80 tokens",
            "data 2, distributed, overlapped",
            "tensor 2, sequence",
            "pipeline 2 x virtual 2",
            "pipeline 2, balanced, offloaded",
            "context 2, 80 tokens",
        ],
    ),
    "tied": (["--processes", "4", "--tied"], ["tensor 2 x pipeline 2", "context 2 x tensor 2, sequence"]),
    "losses and importance of whole responses": (
        ["--processes", "2", "--loss", "gmpo"],
        ["data 2, 80 tokens", "context 2, 80 tokens"],
    ),
    "uneven chunks": (["--uneven"], ["pipeline 2 x virtual 2 of 1 + 3 + 1 + 1"]),
    "experts": (
        ["--processes", "2", "--experts"],
        [
            "expert 2, 80 tokens",
            "expert tensor 2",
            "pipeline 2, recompute experts",
            "expert 2 within context 2",
        ],
    ),
}
ALL = {
    "untied, 1 and 2 processes": (["--processes", "1", "2"], ["tensor 2, sequence", "context 2"]),
    "tied, 1 and 2 processes": (["--processes", "1", "2", "--tied"], ["pipeline 2 x virtual 2"]),
    "untied, 4 processes": (["--processes", "4"], ["tensor 2 x pipeline 2", "context 4"]),
    "tied, 4 processes": (["--processes", "4", "--tied"], ["context 2 x tensor 2", "context 2 x pipeline 2"]),
    "uneven chunks": (
        ["--uneven"],
        [f"pipeline 2 x virtual 2 of {n}" for n in ("2 + 1 + 1 + 2", "2 + 2 + 1 + 1")],
    ),
    "experts, 2 processes": (["--experts", "--processes", "2"], ["expert 2", "expert 2 within tensor 2"]),
    "experts, 4 processes": (
        ["--experts", "--processes", "4"],
        ["expert 2 x tensor 2", "expert 2 x data 2", "expert 2 x pipeline 2", "expert 2 x context 2"],
    ),
}
_WHOLE = ["data 2, 80 tokens", "tensor 2", "pipeline 2", "context 2, 80 tokens"]
ALL |= {
    loss: (["--processes", "2", "--loss", loss, "--only", "1 process, 80 tokens", *_WHOLE], _WHOLE)
    for loss in ("gmpo", "gspo", "cispo", "sapo")
}

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("case", CORE)
def test_every_kind_of_layout_learns_the_same(case, monkeypatch, capsys):
    def start(command, processes):
        run_ranks(TOOL, processes, *command, timeout=240)

    arguments, only = CORE[case]
    monkeypatch.setattr(compare_layouts, "start", start)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments, "--only", *only])
    with pytest.raises(SystemExit) as ended:
        compare_layouts.main()
    output = capsys.readouterr().out
    assert ended.value.code == 0, output
    assert_compared(output, only)


@pytest.mark.long
@pytest.mark.parametrize("case", ALL)
def test_every_layout_learns_the_same(case):
    arguments, some = ALL[case]
    result = subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        env=worker_environment(),
        timeout=280,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert_compared(result.stdout, some)


def assert_compared(output, names):
    lines = output.splitlines()
    for name in names:
        assert any(line.startswith(f"{name} ") for line in lines), f"{name} is not among\n{output}"


def test_a_layout_that_does_not_exist_is_named_before_anything_is_trained(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--only", "tensor 2", "tensor 3"])
    with pytest.raises(SystemExit) as ended:
        compare_layouts.main()
    assert ended.value.code == 2
    assert "--only: no layout is called 'tensor 3'; there are: 1 process, 4096" in capsys.readouterr().err
