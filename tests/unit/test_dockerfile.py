"""The Dockerfile's RUN lines, run where they need neither the image nor a network; Docker itself is not needed."""

import os
import re
import subprocess
from fnmatch import fnmatch

import pytest
from helpers.executables import write_executable
from helpers.source_tree import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")

# Part of a RUN line: why it is not run here. Every line is either run by a test below or stands here.
NOT_RUN = {
    "import megatron_laser.loop": "needs the environment that the lines before have made",
    "useradd": "would change this machine's users",
}
STEPS = ("venv", "packages", "transformer-engine", "package", "check")
RUN = {**{f"--only {step}\n": "steps" for step in STEPS}, "ln -s /opt/megatron-laser": "link"}


def run_lines() -> list[str]:
    """The shell text of every RUN with its newline, here-documents and continued lines included."""
    found, lines = [], iter(TEXT.splitlines())
    for line in lines:
        if not line.startswith("RUN "):
            continue
        text = line.removeprefix("RUN ")
        document = re.search(r"<<'?(\w+)'?", text)
        while document or text.endswith("\\"):
            following = next(lines)
            text += "\n" + following
            if document and following == document[1]:
                break
            if not document and not following.endswith("\\"):
                break
        found.append(text + "\n")
    return found


def the(part: str) -> str:
    (line,) = [line for line in run_lines() if part in line]
    return line


def shell(line: str, folder, **variables: str) -> subprocess.CompletedProcess:
    """Run a line with /opt inside `folder`, and this repository's tools."""
    line = line.replace("/opt/", f"{folder}/opt/").replace("tools/", f"{ROOT}/tools/", 1)
    environment = os.environ | {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"} | variables
    return subprocess.run(
        ["bash", "-euc", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def stand_in_python(folder):
    """A python3.12 that makes environments whose python writes down what it is asked to do, and its variables."""
    noting = (
        'echo "$@ | TE=$NVTE_PYTORCH_FORCE_BUILD EP=$NVTE_WITH_NCCL_EP CPATH=$CPATH PIP=$PIP_CONSTRAINT" '
        f">>{folder}/log"
    )
    write_executable(folder / "noting", noting)
    write_executable(
        folder / "bin" / "python3.12",
        f'[ "$1 $2" = "-m venv" ] || exit 0\nmkdir -p "$3/bin" && cp {folder}/noting "$3/bin/python"',
    )


def test_every_run_line_is_run_here_or_has_a_reason():
    parts = [*NOT_RUN, *RUN]
    for line in run_lines():
        assert len([part for part in parts if part in line]) == 1, (
            f"run this line in a test, or say why not: {line}"
        )
    assert len(run_lines()) == len(parts)


@pytest.mark.parametrize("line", run_lines(), ids=lambda line: line.splitlines()[0][:40])
def test_every_run_line_is_valid_shell_and_its_script_valid_python(line):
    subprocess.run(["bash", "-n", "-c", line], check=True, timeout=10)
    script = re.search(r'python -c "(.*)"', line)
    if script:
        compile(script[1], "Dockerfile", "exec")


def test_the_steps_install_what_is_pinned_and_the_link_names_one_interpreter_for_both(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_LASER_SGLANG_PYTHON", raising=False)
    stand_in_python(tmp_path)
    for line in run_lines():
        if "setup_gpu.sh" in line:
            done = shell(line, tmp_path, PIP_CONSTRAINT="/etc/pip/constraint.txt", PYTHON="python3.12")
            assert done.returncode == 0, done.stderr
    packages, extension, package, check = (tmp_path / "log").read_text().splitlines()
    for line in (packages, extension, package):
        assert f"-c {ROOT}/tools/gpu/constraints.txt" in line
        assert line.endswith("PIP="), "the image's own constraints are for its own packages"
    assert f"-r {ROOT}/tools/gpu/requirements.txt" in packages
    assert (
        "--no-build-isolation --no-binary=transformer_engine_torch transformer_engine_torch==2.20.2"
        in extension
    )
    assert "TE=TRUE EP=0 " in extension and "nvidia/cudnn/include:" in extension
    assert f"--no-build-isolation --editable {ROOT}[gpu]" in package
    assert check.startswith(f"{ROOT}/tools/gpu/check.py ")

    assert shell(the("ln -s /opt/megatron-laser"), tmp_path).returncode == 0
    from helpers.runs import run_config

    from megatron_laser.rollout.servers.command import find_python

    config = run_config(tmp_path, tmp_path, rollout={"engine": "sglang"})
    assert find_python(config.rollout.sglang, tmp_path) == str(tmp_path / ".venv-sglang" / "bin" / "python")


def test_a_step_uses_only_what_has_been_copied_before_it():
    for line in run_lines():
        if "setup_gpu.sh" not in line:
            continue
        copied = re.findall(r"^COPY (.+) \S+$", TEXT.split(f"RUN {line}")[0], re.MULTILINE)
        sources = {source for words in copied for source in words.split()}
        assert {"tools/setup_gpu.sh", "tools/gpu"} <= sources
        if "--only package\n" in line or "--only check" in line:
            assert {"setup.py", "README.md", "megatron_laser"} <= sources


def test_sglang_is_the_version_that_the_cpu_tests_talk_to():
    pins = dict(
        line.split("==")
        for line in (ROOT / "tools/sglang_cpu/constraints.txt").read_text().splitlines()
        if "==" in line
    )
    requirements = (ROOT / "tools/gpu/requirements.txt").read_text().splitlines()
    for name in ("sglang", "sglang-router"):
        assert f"{name}=={pins[name]}" in requirements


def test_the_image_is_pinned_and_runs_as_a_user():
    assert re.search(r"^ARG NGC_TAG=\d\d\.\d\d-py3$", TEXT, re.MULTILINE)
    assert "FROM nvcr.io/nvidia/pytorch:${NGC_TAG}" in TEXT
    assert re.search(r"^USER laser$", TEXT, re.MULTILINE)
    assert not re.search(r"^USER root", TEXT, re.MULTILINE)
    assert re.search(r"^ARG USER_ID=(?!1000$)\d+$", TEXT, re.MULTILINE), "Ubuntu 24.04 has user 1000"


def test_the_context_is_small():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    for name in (".git", ".venv", ".venv-sglang", "runs", "models", "data", "examples/tiny_sum/base_sft"):
        assert any(fnmatch(name, pattern) for pattern in ignored), f"{name} would be sent to Docker"
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    sizes = [(ROOT / name).stat().st_size for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert sum(sizes) < 10 * 2**20
