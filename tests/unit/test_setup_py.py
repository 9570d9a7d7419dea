"""setup.py says what to do where pip cannot install megatron-core."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_MEGATRON_CORE = """
import importlib.metadata, runpy, sys

def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = version
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="on Python 3.12 and newer pip installs megatron-core")
def test_a_plain_pip_install_on_python_3_11_says_what_to_run():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEGATRON_CORE], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "tools/setup_env.sh" in result.stderr
    assert "--ignore-requires-python megatron-core==0.19" in result.stderr


def test_the_version_in_the_message_is_the_one_that_the_set_up_script_installs():
    pinned = [
        line
        for line in (ROOT / "constraints-cpu.txt").read_text().split()
        if line.startswith("megatron-core")
    ]
    assert pinned == ["megatron-core==0.19.2"]
    assert pinned[0] in (ROOT / "setup.py").read_text()
