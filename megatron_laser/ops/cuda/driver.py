"""The few calls of the CUDA driver that a cubin needs: load, describe tensors for the copy engine, launch."""

from __future__ import annotations

import contextlib
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

    Kernels take it by value. It is made of an address and sizes alone, so it is right for whatever matrix of these
    sizes lies there.
    """

    def __init__(
        self, start_address: int, shape: tuple[int, int], row_bytes: int, box_rows: int, box_columns: int
    ) -> None:
        # The driver wants 64-byte alignment, which ctypes does not promise.
        self._memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address = (start + _MAP_ALIGNMENT - 1) // _MAP_ALIGNMENT * _MAP_ALIGNMENT
        rows, columns = shape
        _call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(self.address),
            ctypes.c_int(_BFLOAT16),
            ctypes.c_uint32(2),
            ctypes.c_void_p(start_address),
            (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(row_bytes),
            (ctypes.c_uint32 * 2)(box_columns, box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            ctypes.c_int(0),  # not interleaved
            ctypes.c_int(_SWIZZLE_128B),
            ctypes.c_int(_PROMOTE_256B),
            ctypes.c_int(0),  # outside reads as 0
        )


_cached_map = functools.lru_cache(maxsize=256)(TensorMap)


def tensor_map(matrix: torch.Tensor, box_rows: int, box_columns: int) -> TensorMap:
    """The map of a bfloat16 matrix with columns next to each other; the same one for the same address and sizes.

    Memory that was freed and given to another matrix needs no care: every value in the map is part of the key.
    """
    rows, columns = matrix.shape
    return _cached_map(matrix.data_ptr(), (rows, columns), matrix.stride(0) * 2, box_rows, box_columns)


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
        # Changing the device costs as much as the launch, and it is hardly ever another one.
        here = device.index is None or device.index == torch.cuda.current_device()
        with contextlib.nullcontext() if here else torch.cuda.device(device):
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
