"""The Dockerfile's RUN lines, run where they need neither the image nor a network; Docker itself is not needed."""

import os
import re
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch

import pytest
from helpers.source_tree import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")

# Part of a RUN line: why it is not run here. Every line is either run by a test below or stands here.
NOT_RUN = {
    "pip install --no-cache-dir sglang==": "gigabytes from a package index",
    "import transformer_engine.pytorch": "needs the image's Transformer Engine, apex and CUDA",
    "useradd": "would change this machine's users",
}
RUN = {
    "python -m venv /opt/sglang": "venv",
    "KEEP = re.compile": "constraints",
    "--editable .": "install",
    "became {found}": "unchanged",
    "ln -s /opt/sglang": "link",
}


def run_lines() -> list[str]:
    """The shell text of every RUN, here-documents and continued lines included."""
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
        found.append(text)
    return found


def the(part: str) -> str:
    (line,) = [line for line in run_lines() if part in line]
    return line


def shell(line: str, folder, **variables: str) -> subprocess.CompletedProcess:
    """Run a line with /etc and /opt inside `folder`, and this interpreter as `python`."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "etc").mkdir(exist_ok=True)
    for name, command in {
        "python": f'exec {sys.executable} "$@"',
        "pip": f'exec {sys.executable} -m pip "$@"',
    }.items():
        if not (folder / "bin" / name).exists():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{command}\n")
            (folder / "bin" / name).chmod(0o755)
    line = line.replace("/etc/", f"{folder}/etc/").replace("/opt/", f"{folder}/opt/")
    environment = os.environ | {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"} | variables
    return subprocess.run(
        ["bash", "-euc", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
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
    script = re.search(r"<<'PY'.*?\n(.*)\nPY$", line, re.DOTALL)
    if script:
        compile(script[1], "Dockerfile", "exec")


def test_the_images_packages_are_pinned_and_a_replaced_one_fails_the_build(tmp_path):
    done = shell(the("KEEP = re.compile"), tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "etc" / "megatron-laser-constraints.txt"
    pinned = file.read_text().split()
    import torch

    assert any(
        re.fullmatch(rf"torch=={re.escape(torch.__version__.split('+')[0])}.*", line) for line in pinned
    )
    assert any(line.startswith("numpy==") for line in pinned)
    assert shell(the("became {found}"), tmp_path).returncode == 0
    file.write_text("numpy==0.0.1\n")
    done = shell(the("became {found}"), tmp_path)
    assert done.returncode != 0
    assert "numpy 0.0.1 became" in done.stderr


def test_the_servers_environment_is_made_and_found(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_LASER_SGLANG_PYTHON", raising=False)
    done = shell(the("python -m venv /opt/sglang"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert shell(the("ln -s /opt/sglang"), tmp_path).returncode == 0
    from helpers.runs import run_config

    from megatron_laser.rollout.serving.command import find_python

    config = run_config(tmp_path, tmp_path, rollout={"engine": "sglang"})
    assert find_python(config.rollout.sglang, tmp_path) == str(tmp_path / ".venv-sglang" / "bin" / "python")


@pytest.mark.long
def test_the_package_installs_from_what_is_copied_before_without_replacing_anything(tmp_path):
    """In an environment of its own that sees this one's packages, and without an index: nothing may be missing."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=120)
    (tmp_path / "bin").mkdir()
    for name in ("python", "pip"):
        (tmp_path / "bin" / name).symlink_to(tmp_path / "env" / "bin" / name)
    packages = {"PYTHONPATH": sysconfig.get_paths()["purelib"], "PIP_NO_INDEX": "1"}
    done = shell(the("KEEP = re.compile"), tmp_path, **packages)
    assert done.returncode == 0, done.stderr
    copied = re.findall(r"^COPY (.+) (\S+)$", TEXT.split("--editable .")[0], re.MULTILINE)
    for sources, target in copied:
        for source in sources.split():
            subprocess.run(["cp", "-r", str(ROOT / source), str(tmp_path / target)], check=True, timeout=60)
    done = shell(the("--editable ."), tmp_path, **packages)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Successfully installed" in done.stdout
    assert shell(the("became {found}"), tmp_path, **packages).returncode == 0


def test_sglang_is_the_version_that_the_cpu_tests_talk_to():
    pins = dict(
        line.split("==")
        for line in (ROOT / "tools/sglang_cpu/constraints.txt").read_text().splitlines()
        if "==" in line
    )
    line = the("pip install --no-cache-dir sglang==")
    for name in ("sglang", "sglang-router"):
        assert f" {name}=={pins[name]}" in line


def test_the_image_is_pinned_and_runs_as_a_user():
    assert re.search(r"^ARG NGC_TAG=\d\d\.\d\d-py3$", TEXT, re.MULTILINE)
    assert "FROM nvcr.io/nvidia/pytorch:${NGC_TAG}" in TEXT
    assert re.search(r"^USER laser$", TEXT, re.MULTILINE)
    assert not re.search(r"^USER root", TEXT, re.MULTILINE)


def test_the_context_is_small():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    for name in (".git", ".venv", ".venv-sglang", "runs", "models", "data", "examples/tiny_sum/base_sft"):
        assert any(fnmatch(name, pattern) for pattern in ignored), f"{name} would be sent to Docker"
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    sizes = [(ROOT / name).stat().st_size for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert sum(sizes) < 8 * 2**20
