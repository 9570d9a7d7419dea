"""What one interpreter's environment has. Run as a script it prints that as JSON.

It needs nothing but Python, so that the servers' interpreter can be asked, too. SGLang is never imported: only its
version is read.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import runpy
import sys
from pathlib import Path

PACKAGES = (
    *(
        "torch",
        "triton",
        "transformer-engine",
        "transformer-engine-torch",
        "apex",
        "flash-attn",
        "megatron-core",
    ),
    *(
        "sglang",
        "sglang-router",
        "transformers",
        "numpy",
        "pyarrow",
        "safetensors",
        "pydantic",
        "math-verify",
    ),
)
# Installed is not enough: these fail to import beside the wrong torch, CUDA or NumPy.
IMPORTED = {
    "transformer-engine": "transformer_engine.pytorch",
    "apex": "apex",
    "pyarrow": "pyarrow.parquet",
    "triton": "triton",
}
_LONGEST = 300  # characters of a reason


def collect() -> dict[str, str]:
    """Name -> version, or "not installed", or "VERSION, fails to import: REASON"; with python, cuda and nccl."""
    found = {"python": f"{sys.version.split()[0]} on {platform.platform()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if found["torch"] != "not installed":
        found |= _of_torch()
    for package, module in IMPORTED.items():
        if found[package] != "not installed" and (reason := _import_problem(module)):
            found[package] += f", fails to import: {reason}"
    return found


def _of_torch() -> dict[str, str]:
    try:
        import torch
    except Exception as error:  # a library that is missing raises OSError
        return {"torch": f"{importlib.metadata.version('torch')}, fails to import: {_short(error)}"}
    found = {"torch": str(torch.__version__), "cuda": torch.version.cuda or "none: torch is built for CPUs"}
    if torch.version.cuda:
        # By path: this package is not there in the servers' environment.
        nccl = runpy.run_path(str(Path(__file__).parents[1] / "rollout" / "nccl.py"))
        found["nccl"] = nccl["loaded_version"]() or "unknown: no libnccl is loaded"
    return found


def _import_problem(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever it is, it is what this is for
        return _short(error)
    return ""


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]


if __name__ == "__main__":
    here = Path(__file__).resolve().parent  # its modules are nobody's top-level packages
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != here]
    print(json.dumps(collect()))
