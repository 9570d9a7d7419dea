"""Compiles the CUDA C++ kernels for Hopper to a cubin, once; `python -m` builds it ahead of time.

With nvcc, or where there is none with NVRTC, the same compiler as a library. A cubin is loaded through the driver, so
it depends on no version of torch or Python. It is cached under MEGATRON_LASER_CACHE (default ~/.cache/megatron_laser)
by the hash of the source.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_laser.ops.cuda.nvrtc import NvrtcError, compile_to_cubin
from megatron_laser.ops.cuda.plan import PAIR_COLUMNS, WEIGHT_LEFT_ROWS

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cu") for name in ("hopper", "few_row_logprob", "few_row_pairs")
)
NAME = "few_row_logprob"
# Columns of one product that the kernels ask for: few hidden rows, or tiles of the weight.
PRODUCTS = tuple(sorted({*WEIGHT_LEFT_ROWS, *PAIR_COLUMNS}))
# 90a, not 90: wgmma and setmaxnreg exist only there. Spills are reported, registers listed.
ARCHITECTURE = "-arch=sm_90a"
NVCC_FLAGS = ("-cubin", ARCHITECTURE, "-O3", "-std=c++17", "-Xptxas", "-v,-warn-spills")
NVRTC_FLAGS = (ARCHITECTURE, "-std=c++17", "--ptxas-options=-v", "--ptxas-options=-warn-spills")


class BuildError(RuntimeError):
    """The kernel cannot be compiled here; the message says what is missing and what to do."""


def source() -> str:
    """All of the CUDA C++ in one text: what Hopper offers, the products, the kernels."""
    hopper, *kernels = (path.read_text(encoding="utf-8") for path in SOURCES)
    return "\n".join([hopper, products(), *kernels])


def products() -> str:
    """`Wgmma<N>` for all of `PRODUCTS`: the instruction names each of its N / 2 accumulators."""
    texts = [
        "// d [64, N] += a [64, 16] b [N, 16]^T, bfloat16 in, float32 out; the sum starts anew unless `accumulate`.\n"
        "template <int N>\nstruct Wgmma;\n"
    ]
    for columns in PRODUCTS:
        count = columns // 2
        sums = ", ".join(f"%{index}" for index in range(count))
        operands = ", ".join(f'"+f"(d[{index}])' for index in range(count))
        texts.append(
            f"template <>\nstruct Wgmma<{columns}> {{\n"
            f"  DEVICE static void run(float (&d)[{count}], u64 a, u64 b, int accumulate) {{\n"
            f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"\n'
            f'                 "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 "\n'
            f'                 "{{{sums}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}\\n"\n'
            f"                 : {operands}\n"
            '                 : "l"(a), "l"(b), "r"(accumulate));\n'
            "  }\n};\n"
        )
    return "\n".join(texts)


def find_nvcc() -> Path | None:
    """nvcc from CUDA_HOME, PATH or /usr/local/cuda, in this order; None when there is none."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    places += [Path(on_path)] if on_path else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def compile_kernel(target: Path) -> str:
    """Compile into the file `target`; returns the compiler's messages (registers and spills of each kernel).

    Raises BuildError with the end of those messages when it does not compile.
    """
    failures = []
    nvcc = find_nvcc()
    if nvcc is None:
        failures.append("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
    else:
        try:
            return compile_with_nvcc(nvcc, target)
        except BuildError as error:
            failures.append(str(error))
    try:
        return compile_with_nvrtc(target)
    except NvrtcError as error:
        failures.append(str(error))
    raise BuildError(
        f"The CUDA C++ kernels cannot be compiled: {'; '.join(failures)}. Install the CUDA toolkit 12.3 or newer or "
        "the Python package nvidia-cuda-nvrtc, or build elsewhere with tools/build_kernels.sh and copy its file into "
        f"{cache_folder()}; until then the Triton kernel is used"
    )


def compile_with_nvcc(nvcc: Path, target: Path) -> str:
    """`compile_kernel` with this nvcc; it needs a host C++ compiler, too."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / f"{NAME}.cu"
            whole.write_text(source(), encoding="utf-8")
            command = [str(nvcc), *NVCC_FLAGS, "-o", str(target), str(whole)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{nvcc}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def compile_with_nvrtc(target: Path) -> str:
    """`compile_kernel` with NVRTC. Raises NvrtcError."""
    cubin, messages = compile_to_cubin(source(), f"{NAME}.cu", NVRTC_FLAGS)
    target.write_bytes(cubin)
    return messages


def cache_folder() -> Path:
    """Where built kernels are kept."""
    return Path(os.environ.get("MEGATRON_LASER_CACHE") or Path.home() / ".cache" / "megatron_laser")


def built_kernel() -> Path:
    """The cubin, compiled now if it is not in the cache; several processes may ask at the same time.

    Raises BuildError.
    """
    name = f"{NAME}-{_fingerprint()}.sm_90a.cubin"
    target = cache_folder() / name
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            compile_kernel(Path(scratch) / name)
            # Under its final name there is never half a file.
            os.replace(Path(scratch) / name, target)
    except OSError as error:
        raise BuildError(
            f"{target} cannot be written ({error}): set MEGATRON_LASER_CACHE to a folder that can; until then the "
            "Triton kernel is used"
        ) from error
    return target


def _fingerprint() -> str:
    # Not the compiler: a cubin that was built elsewhere must be found on a machine without one.
    return hashlib.sha256((source() + ARCHITECTURE).encode()).hexdigest()[:16]


if __name__ == "__main__":
    try:
        print(built_kernel())
    except BuildError as failure:
        sys.exit(f"error: {failure}")
