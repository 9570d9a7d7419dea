"""Statistics of at most 128 rows by the CUDA C++ kernels for Hopper, built on first use; plan.py says which one."""

from __future__ import annotations

import ctypes
import functools

import torch

from megatron_laser.ops.cuda.build import BuildError, built_kernel
from megatron_laser.ops.cuda.driver import DriverError, Function, Module, tensor_map
from megatron_laser.ops.cuda.plan import MAX_ROWS, Plan, choose, every_plan
from megatron_laser.ops.device import capability, multiprocessors
from megatron_laser.ops.few_rows import FewRows

DEPTH = 64  # columns of one copy: 128 bytes, what the swizzle works on


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
        for kernel in every_plan():
            _function(device, kernel)
    except (BuildError, DriverError) as error:
        return str(error)
    return None


@functools.cache
def _module(device: torch.device) -> Module:
    return Module(built_kernel(), device)


@functools.cache
def _function(device: torch.device, plan: Plan) -> Function:
    return _module(device).function(plan.name, plan.shared_bytes)


class CudaFewRowEngine:
    """A `FewRowReducer` for inputs that `refuses` does not refuse."""

    def __init__(self, plan: Plan | None = None) -> None:
        """`plan`: instead of what the shape and the device ask for; it must take the rows."""
        self._plan = plan

    def partials(self, problem: FewRows) -> torch.Tensor:
        """See `FewRowReducer`."""
        hidden, weight, labels, shard = problem
        device, (rows, hidden_size) = hidden.device, hidden.shape
        count = multiprocessors(device)
        plan = self._plan or choose(rows, shard.columns, count, hidden_size)
        programs = plan.programs(shard.columns, count)
        partials = torch.empty((3, programs, rows), dtype=torch.float32, device=device)
        _function(device, plan).launch(
            (programs, 1) if plan.pairs else (1, programs),
            plan.threads,
            device,
            tensor_map(hidden, plan.hidden_box, DEPTH),
            tensor_map(weight, plan.columns, DEPTH),
            ctypes.c_void_p(labels.data_ptr()),
            ctypes.c_void_p(partials.data_ptr()),
            ctypes.c_int(rows),
            ctypes.c_int(shard.columns),
            ctypes.c_int(-(-hidden_size // DEPTH)),
            ctypes.c_longlong(shard.first),
            ctypes.c_int(plan.rounds(shard.columns, count) if plan.pairs else plan.tiles(shard.columns)),
        )
        return partials
