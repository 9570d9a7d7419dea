"""Compiling CUDA C++ with NVRTC, the compiler as a library: no host compiler, and torch's CUDA wheels bring it."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from pathlib import Path


class NvrtcError(RuntimeError):
    """NVRTC is missing or does not compile the source; the message has the end of its log."""


def find_nvrtc() -> str:
    """The library's path or name: in NVIDIA's Python packages, else where the system's loader looks.

    Raises NvrtcError when there is none.
    """
    for folder in sys.path:
        for pattern in ("nvidia/cu*/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*"):
            found = sorted(path for path in Path(folder or ".").glob(pattern) if "alt" not in path.name)
            if found:
                return str(found[-1])
    name = ctypes.util.find_library("nvrtc")
    if name is None:
        raise NvrtcError("libnvrtc was not found (Python package nvidia-cuda-nvrtc, or the CUDA toolkit)")
    return name


def compile_to_cubin(source: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """(cubin, the compiler's log). `options` must name a real architecture, for example -arch=sm_90a.

    Raises NvrtcError.
    """
    path = find_nvrtc()
    try:
        # NVRTC opens this one by its bare name, which is found only if it is loaded already.
        for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        library = ctypes.CDLL(path)
    except OSError as error:
        raise NvrtcError(f"{path} cannot be loaded: {error}") from error
    program = ctypes.c_void_p()

    def call(function: str, *arguments: object) -> int:
        return int(getattr(library, function)(*arguments))

    def text_of(size_function: str, function: str) -> bytes:
        size = ctypes.c_size_t()
        if call(size_function, program, ctypes.byref(size)) != 0 or size.value == 0:
            return b""
        content = ctypes.create_string_buffer(size.value)
        call(function, program, content)
        return content.raw

    if call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None) != 0:
        raise NvrtcError(f"{path}: nvrtcCreateProgram failed")
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = call("nvrtcCompileProgram", program, len(options), arguments)
        log = text_of("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
        cubin = text_of("nvrtcGetCUBINSize", "nvrtcGetCUBIN") if status == 0 else b""
    finally:
        call("nvrtcDestroyProgram", ctypes.byref(program))
    if not cubin:
        raise NvrtcError(f"{path} could not compile {name} (status {status}):\n{log[-2000:]}")
    return cubin, log
