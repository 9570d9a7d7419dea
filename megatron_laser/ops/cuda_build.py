"""Compiles the CUDA C++ kernel for Hopper with nvcc to a cubin, once; `python -m` builds it ahead of time.

A cubin is loaded through the driver, so it depends on no version of torch or Python. It is cached under
MEGATRON_LASER_CACHE (default ~/.cache/megatron_laser) by the hash of the source and the flags.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda") / "few_row_logprob.cu"
# 90a, not 90: wgmma and setmaxnreg exist only there.
FLAGS = ("-cubin", "-arch=sm_90a", "-O3", "-std=c++17", "-Xptxas", "-v,-warn-spills")


class BuildError(RuntimeError):
    """The kernel cannot be compiled here; the message says what is missing and what to do."""


def find_nvcc() -> Path:
    """nvcc from CUDA_HOME, PATH, NVIDIA's Python package or /usr/local/cuda, in this order.

    Raises BuildError when there is none.
    """
    places = [Path(home) / "bin" / "nvcc" for home in (os.environ.get("CUDA_HOME"),) if home]
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    for folder in sys.path:
        places += sorted(Path(folder).glob("nvidia/cu*/bin/nvcc")) if folder else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place
    raise BuildError(
        "nvcc was not found (CUDA_HOME, PATH, the Python package nvidia-cuda-nvcc, /usr/local/cuda): install the CUDA "
        "toolkit 12.3 or newer, or build elsewhere with tools/build_kernels.sh and copy its cache. Until then the "
        "Triton kernel is used"
    )


def cache_folder() -> Path:
    """Where built kernels are kept."""
    return Path(os.environ.get("MEGATRON_LASER_CACHE") or Path.home() / ".cache" / "megatron_laser")


def compile_kernel(target: Path, nvcc: Path | None = None) -> str:
    """Compile into the file `target`; returns the compiler's messages (registers and spills of each kernel).

    Raises BuildError with the end of those messages when it does not compile.
    """
    command = [str(nvcc or find_nvcc()), *FLAGS, "-o", str(target), str(SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def built_kernel() -> Path:
    """The cubin, compiled now if it is not in the cache; several processes may ask at the same time.

    Raises BuildError.
    """
    name = f"{SOURCE.stem}-{_fingerprint()}.sm_90a.cubin"
    target = cache_folder() / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            compile_kernel(Path(scratch) / name)
            # Under its final name there is never half a file.
            os.replace(Path(scratch) / name, target)
    return target


def _fingerprint() -> str:
    # Not the compiler: a cubin that was built elsewhere must be found on a machine without one.
    return hashlib.sha256(SOURCE.read_bytes() + repr(FLAGS).encode()).hexdigest()[:16]


if __name__ == "__main__":
    try:
        print(built_kernel())
    except BuildError as failure:
        sys.exit(f"error: {failure}")
