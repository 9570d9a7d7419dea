"""Every tool says what it does and takes, and those that hook into the package find their places there."""

import os
import re
import subprocess
import sys

import pytest
from helpers.source_tree import ROOT
from helpers.tiny_run import write_tiny_run

sys.path.insert(0, str(ROOT / "tools"))

from peer.workers import Worker
from soak import soak

TOOLS = sorted(file for pattern in ("*.sh", "*.py", "gpu/*.py") for file in (ROOT / "tools").glob(pattern))
# By what they import: torch; or all that a run does, and TRL.
MARKS = {"measure_example.py": [pytest.mark.slow], "peer_trl.py": [pytest.mark.slow, pytest.mark.long]}


@pytest.mark.parametrize(
    "tool",
    [pytest.param(file, id=file.name, marks=MARKS.get(file.name, [])) for file in TOOLS],
)
def test_a_tool_says_what_it_does_and_takes(tool, tmp_path):
    interpreter = "bash" if tool.suffix == ".sh" else sys.executable
    done = subprocess.run(
        [interpreter, str(tool), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_check_of_the_gpu_environment_names_what_this_one_lacks():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/gpu/check.py")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr
    assert all(line.startswith("WRONG: ") for line in done.stderr.splitlines()), done.stderr
    assert "megatron-core" in done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_the_comparison_with_trl_drives_our_loop_in_turns(tmp_path):
    """The worker changes how the Controller collects, and how the graders are given responses."""
    run = write_tiny_run(tmp_path / "run")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    command = [sys.executable, "-m", "peer.our_worker", str(run)]
    with Worker("ours", command, {"PYTHONPATH": paths}, tmp_path / "log", deadline=120) as worker:
        assert worker.ready()["threads"] == 1
        (first,) = worker.run(1)
        assert first["seconds"] > first["submit"] > 0
        assert len(worker.run(2)) == 2


def test_the_soak_reads_memory_files_and_threads_after_every_step(tmp_path):
    run = write_tiny_run(tmp_path)
    readings = soak(run, 3, [f"data.validation={tmp_path / 'train.jsonl'}"])
    assert [reading.step for reading in readings] == [1, 2, 3]
    assert all(reading.memory_mib > 0 and reading.files > 0 and reading.threads > 0 for reading in readings)


def test_files_that_scripts_and_pages_name_are_there():
    named = re.compile(
        r"(?<![\w/.])(?:tests|tools|examples|megatron_laser)/[\w/.-]+\.(?:py|sh|yaml|cu|txt)\b"
    )
    texts = [*ROOT.glob("*.md"), ROOT / "Dockerfile", ROOT / "pyproject.toml"]
    texts += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("tools/**/*.sh")]
    missing = [
        f"{text.relative_to(ROOT)} names {name}"
        for text in texts
        for name in sorted(set(named.findall(text.read_text(encoding="utf-8"))))
        if not (ROOT / name).exists()
    ]
    assert missing == []
