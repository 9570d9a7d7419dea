"""What the GPU environment would consist of, asked of the package index: nothing is installed, only metadata is read.

Resolves tools/gpu/requirements.txt together with this package and its extra `gpu` for Python 3.12 on Linux x86-64, and
fails unless one torch and one NCCL come out. Transformer Engine's torch extension and apex are not part of it: the
first is built from source, the second left out.

    python tools/gpu/resolve.py            # with constraints.txt, as the Dockerfile and tools/setup_gpu.sh install it
    python tools/gpu/resolve.py --direct   # only what is named in the two sets: is it there, do its own pins agree
    python tools/gpu/resolve.py --write    # anew, and writes constraints.txt

Exit status: 0; 1: not one torch and one NCCL, or the requirements contradict each other; 3: no package index.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "tools/gpu/requirements.txt"
CONSTRAINTS = ROOT / "tools/gpu/constraints.txt"
PYTHON = "3.12"
NO_INDEX = 3
_DEADLINE = 540.0  # seconds; a resolution takes one to two minutes
_MIN_PIP = (25, 0)  # older ones download every wheel, some gigabytes, even in a dry run
_SHOWN = ("torch", "nvidia-nccl-", "transformer-engine", "triton", "megatron-core", "transformers", "sglang")
_NEWEST_GLIBC = 39  # Ubuntu 24.04's
_HEADER = """\
# All packages of the GPU environment (Python 3.12, Linux x86-64), as resolved from requirements.txt, this package and
# its extra `gpu` by `python tools/gpu/resolve.py --write`. Resolved, not installed: nothing here has run on a GPU yet.
"""

# pip takes the markers' Python from the interpreter that it runs in, whatever --python-version says.
_PIP = f"""\
import runpy, sys
from pip._vendor.packaging import markers
own = markers.default_environment
def target():
    return {{**own(), "python_version": "{PYTHON}", "python_full_version": "{PYTHON}.3"}}
markers.default_environment = target
sys.argv = ["pip", *sys.argv[1:]]
runpy.run_module("pip", run_name="__main__")
"""


def own_requirements() -> list[str]:
    """What setup.py asks for, with the extra `gpu`."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    found: list[str] = []
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        name = ast.unparse(node.targets[0])
        if name == "INSTALL_REQUIRES":
            found += ast.literal_eval(node.value)
        if name == "EXTRAS_REQUIRE" and isinstance(node.value, ast.Dict):
            extras = {
                ast.literal_eval(key): value for key, value in zip(node.value.keys, node.value.values) if key
            }
            found += ast.literal_eval(extras["gpu"])
    return found


def canonical(name: str) -> str:
    """The spelling under which an index knows a package."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_constraints() -> dict[str, str]:
    """Package -> version of constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def problems(packages: dict[str, str]) -> list[str]:
    """Why these packages are not one environment; empty: they are."""
    found = []
    if "torch" not in packages:
        found.append("no torch among the packages")
    nccl = {name: version for name, version in packages.items() if name.startswith("nvidia-nccl-")}
    if len(nccl) != 1:
        listed = ", ".join(f"{name} {version}" for name, version in nccl.items()) or "none"
        found.append(f"one nvidia-nccl package is needed, and this has: {listed}")
    return found


def with_pip(folder: str) -> dict[str, str]:
    """The environment in which `python` has a pip that reads metadata alone; installs one into `folder` if need be."""
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    try:
        found = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    version = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if version >= _MIN_PIP:
        return environment
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-input",
        "--target",
        folder,
        "pip>=25.3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    if done.returncode != 0:
        raise ConnectionError(done.stderr.strip()[-300:])
    path = os.pathsep.join(filter(None, [folder, environment.get("PYTHONPATH", "")]))
    return environment | {"PYTHONPATH": path}


def disagreements(items: list[dict[str, Any]], pinned: dict[str, str]) -> list[str]:
    """What packages require of others that the pins do not keep.

    Args: items: of pip's report, with their metadata.
    """
    from pip._vendor.packaging.requirements import Requirement

    found = []
    for item in items:
        metadata = item["metadata"]
        for line in metadata.get("requires_dist", []):
            wanted = Requirement(line)
            extras = ("", *map(canonical, item.get("requested_extras", [])))
            target = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.3"}
            if wanted.marker and not any(
                wanted.marker.evaluate(target | {"extra": extra}) for extra in extras
            ):
                continue
            version = pinned.get(canonical(wanted.name))
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                found.append(
                    f"{metadata['name']} {metadata['version']} requires {wanted}, pinned is {version}"
                )
    return found


def resolve(*, constrained: bool, direct: bool = False) -> list[dict[str, Any]]:
    """What pip's own resolver would install, with each one's metadata; `direct`: without what these need.

    Raises:
        ConnectionError: no package index answers.
        RuntimeError: the requirements contradict each other, or pip fails; pip's last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = with_pip(f"{folder}/pip")
        report = Path(folder) / "report.json"
        (Path(folder) / "own.txt").write_text("\n".join(own_requirements()) + "\n", encoding="utf-8")
        platforms = ["linux_x86_64", "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
        platforms += [f"manylinux_2_{minor}_x86_64" for minor in range(5, _NEWEST_GLIBC + 1)]
        command = [
            *(
                sys.executable,
                "-c",
                _PIP,
                "install",
                "--dry-run",
                "--quiet",
                "--no-input",
                "--ignore-installed",
            ),
            *("--use-feature=fast-deps", "--disable-pip-version-check", "--report", str(report)),
            *("--only-binary=:all:", "--python-version", PYTHON, "--target", f"{folder}/target"),
            *(word for name in platforms for word in ("--platform", name)),
            *("--requirement", str(REQUIREMENTS), "--requirement", f"{folder}/own.txt"),
            *(("--constraint", str(CONSTRAINTS)) if constrained else ()),
            *(("--no-deps",) if direct else ()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE, env=environment)
        if done.returncode != 0:
            said = done.stderr.strip()[-1500:]
            unreachable = re.search(
                r"from versions: none\)|NewConnectionError|Max retries|Temporary failure", said
            )
            raise ConnectionError(said) if unreachable else RuntimeError(said)
        return json.loads(report.read_text(encoding="utf-8"))["install"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="resolve anew and write constraints.txt")
    parser.add_argument("--direct", action="store_true", help="only the packages that are named")
    arguments = parser.parse_args()
    write, direct = arguments.write, arguments.direct and not arguments.write
    try:
        items = resolve(constrained=not write, direct=direct)
    except ConnectionError as error:
        print(f"no package index: {error}", file=sys.stderr)
        return NO_INDEX
    except RuntimeError as error:
        print(f"the requirements do not resolve: {error}", file=sys.stderr)
        return 1
    packages = {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in items}
    for name in sorted(packages):
        if name.startswith(_SHOWN) or name in ("numpy", "pyarrow"):
            print(f"{name:28s} {packages[name]}")
    pinned = packages if write else read_constraints()
    wrong = problems(pinned if direct else packages) + disagreements(items, pinned)
    for problem in wrong:
        print(problem, file=sys.stderr)
    if write and not wrong:
        listed = "".join(f"{name}=={packages[name]}\n" for name in sorted(packages))
        CONSTRAINTS.write_text(_HEADER + listed, encoding="utf-8")
    print(f"{len(packages)} packages")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
