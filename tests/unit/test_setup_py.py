"""setup.py declares what the package imports, and says what to do where pip cannot install megatron-core."""

import ast
import subprocess
import sys

import pytest
from helpers.source_tree import PACKAGE, ROOT, all_imports
from packaging.requirements import Requirement

# Requirement -> the name that is imported, where it is another one.
IMPORTED_AS = {
    "megatron-core": "megatron",
    "math-verify": "math_verify",
    "pyyaml": "yaml",
    "tensorboard": "torch.utils.tensorboard",  # torch's own writer, which needs the package
}
# Imported name -> the requirement that it is a part of.
PART_OF = {"pydantic_core": "pydantic"}
# Not required: looked for, and done without; what a bench compares with; an extra.
OPTIONAL = {"triton", "transformer_engine", "wandb", "liger_kernel", "cut_cross_entropy", "quack"}
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


def requirements():
    """Names of INSTALL_REQUIRES, read and not run."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTALL_REQUIRES":
            return [Requirement(line).name for line in ast.literal_eval(node.value)]
    raise AssertionError("setup.py has no INSTALL_REQUIRES")


def test_every_requirement_is_imported_somewhere():
    imported = {one.target for _, one in all_imports()}
    unused = [
        name
        for name in requirements()
        if not any(f"{target}.".startswith(f"{IMPORTED_AS.get(name, name)}.") for target in imported)
    ]
    assert unused == []


def test_every_import_of_another_package_is_declared():
    declared = (
        {IMPORTED_AS.get(name, name) for name in requirements()} | OPTIONAL | set(sys.stdlib_module_names)
    )
    found = {one.target.split(".")[0]: str(one) for _, one in all_imports()}
    found.pop(PACKAGE)
    unknown = [text for name, text in found.items() if PART_OF.get(name, name) not in declared]
    assert not unknown, f"declare in setup.py, or name in OPTIONAL of this file, what {unknown}"
