"""The few calls of the CUDA driver that a cubin needs: load, describe tensors for the copy engine, launch."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

_MAX_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_BFLOAT16 = 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
_SWIZZLE_128B = 3
_PROMOTE_256B = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


class DriverError(RuntimeError):
    """A driver call failed; the message has its name and the driver's own words."""


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(
            f"libcuda.so.1 cannot be loaded ({error}): is the NVIDIA driver installed?"
        ) from error


def _call(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{name} failed with {status}: {(text.value or b'unknown error').decode()}")


class TensorMap:
    """A bfloat16 matrix [rows, columns] for the copy engine, in boxes of [box_rows, box_columns], 128-byte swizzle.

    Kernels take it by value; it stays valid as long as the matrix's memory.
    """

    def __init__(self, matrix: torch.Tensor, box_rows: int, box_columns: int) -> None:
        # The driver wants 64-byte alignment, which ctypes does not promise.
        self._memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address = (start + _MAP_ALIGNMENT - 1) // _MAP_ALIGNMENT * _MAP_ALIGNMENT
        rows, columns = matrix.shape
        _call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(self.address),
            ctypes.c_int(_BFLOAT16),
            ctypes.c_uint32(2),
            ctypes.c_void_p(matrix.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(matrix.stride(0) * matrix.element_size()),
            (ctypes.c_uint32 * 2)(box_columns, box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            ctypes.c_int(0),  # not interleaved
            ctypes.c_int(_SWIZZLE_128B),
            ctypes.c_int(_PROMOTE_256B),
            ctypes.c_int(0),  # outside reads as 0
        )


class Function:
    """A kernel of a loaded cubin."""

    def __init__(self, handle: ctypes.c_void_p, shared_bytes: int) -> None:
        self._handle, self._shared_bytes = handle, shared_bytes
        _call(
            "cuFuncSetAttribute", handle, ctypes.c_int(_MAX_DYNAMIC_SHARED_MEMORY), ctypes.c_int(shared_bytes)
        )

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        device: torch.device,
        *arguments: ctypes._SimpleCData | TensorMap,
    ) -> None:
        """Launch on torch's current stream of `device`; `arguments` in the order of the kernel's parameters."""
        addresses = [
            argument.address if isinstance(argument, TensorMap) else ctypes.addressof(argument)
            for argument in arguments
        ]
        with torch.cuda.device(device):
            _call(
                "cuLaunchKernel",
                self._handle,
                *(ctypes.c_uint(size) for size in (*grid, 1, threads, 1, 1, self._shared_bytes)),
                ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
                (ctypes.c_void_p * len(addresses))(*addresses),
                None,
            )


class Module:
    """A cubin in the context of one device."""

    def __init__(self, cubin: Path, device: torch.device) -> None:
        self._handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            # The runtime makes the device's primary context current in this thread with its first real call.
            torch.cuda.current_stream(device).synchronize()
            _call("cuModuleLoadData", ctypes.byref(self._handle), ctypes.c_char_p(cubin.read_bytes()))

    def function(self, name: str, shared_bytes: int) -> Function:
        """The kernel `name` with `shared_bytes` of dynamic shared memory."""
        handle = ctypes.c_void_p()
        _call("cuModuleGetFunction", ctypes.byref(handle), self._handle, ctypes.c_char_p(name.encode()))
        return Function(handle, shared_bytes)
