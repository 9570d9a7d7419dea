"""Statistics of at most 128 rows by the CUDA C++ kernel for Hopper: cuda/few_row_logprob.cu, built on first use."""

from __future__ import annotations

import ctypes
import functools

import torch

from megatron_laser.ops.cuda.build import BuildError, built_kernel
from megatron_laser.ops.cuda.driver import DriverError, Function, Module, TensorMap
from megatron_laser.ops.device import capability, multiprocessors
from megatron_laser.ops.few_rows import FewRows

MAX_ROWS = 128
# The constants of the source: tile of the weight, threads of a program, and per number of rows the shared memory.
TILE_COLUMNS, DEPTH, THREADS = 256, 64, 384
ROWS = (16, 32, 64, 128)


def shared_bytes(rows: int) -> int:
    """Dynamic shared memory of the kernel for `rows`: `Layout<rows>::TOTAL_BYTES` of the source."""
    stages = 5 if rows <= 64 else 4
    stage = (TILE_COLUMNS + rows) * DEPTH * 2
    return 1024 + stages * stage + 17 * rows * 4 + 2 * stages * 8


def refuses(hidden: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernel cannot take these [rows, H] and [V_shard, H] (aligned, checked elsewhere), or None.

    The first answer for a Hopper device builds and loads the kernel.
    """
    device = hidden.device
    if device.type != "cuda" or capability(device) != (9, 0):
        return f"it is for compute capability (9, 0), {device} has {capability(device)}"
    if hidden.dtype != torch.bfloat16:
        return f"it is for bfloat16, not {hidden.dtype}"
    if not 0 < hidden.shape[0] <= MAX_ROWS:
        return f"it takes 1 to {MAX_ROWS} rows, not {hidden.shape[0]}"
    return _load_failure(device)


@functools.cache
def _load_failure(device: torch.device) -> str | None:
    try:
        for rows in ROWS:
            _function(device, rows)
    except (BuildError, DriverError) as error:
        return str(error)
    return None


@functools.cache
def _module(device: torch.device) -> Module:
    return Module(built_kernel(), device)


@functools.cache
def _function(device: torch.device, rows: int) -> Function:
    return _module(device).function(f"few_row_logprob_{rows}", shared_bytes(rows))


class CudaFewRowEngine:
    """A `FewRowReducer` for inputs that `refuses` does not refuse."""

    def partials(self, problem: FewRows) -> torch.Tensor:
        """See `FewRowReducer`."""
        hidden, weight, labels, shard = problem
        rows, hidden_size = hidden.shape
        size = next(size for size in ROWS if size >= rows)
        column_tiles = -(-shard.columns // TILE_COLUMNS)
        programs = min(column_tiles, multiprocessors(hidden.device))
        partials = torch.empty((3, programs, rows), dtype=torch.float32, device=hidden.device)
        _function(hidden.device, size).launch(
            (1, programs),
            THREADS,
            hidden.device,
            TensorMap(hidden, size, DEPTH),
            TensorMap(weight, TILE_COLUMNS, DEPTH),
            ctypes.c_void_p(labels.data_ptr()),
            ctypes.c_void_p(partials.data_ptr()),
            ctypes.c_int(rows),
            ctypes.c_int(shard.columns),
            ctypes.c_int(-(-hidden_size // DEPTH)),
            ctypes.c_longlong(shard.first),
            ctypes.c_int(column_tiles),
        )
        return partials
