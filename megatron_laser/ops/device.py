"""What the kernels ask about the device, and whether Triton runs in its interpreter."""

from __future__ import annotations

import functools
import importlib.util

import torch


def kernels_refuse(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, or None: they need a CUDA device, or Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        if capability(device) < (8, 0):
            return f"compute capability {capability(device)} is below (8, 0)"
        return "TRITON_INTERPRET is set, and the interpreter is for the CPU" if interpreted() else None
    if device.type == "cpu" and interpreted():
        return None
    return "the kernels need a CUDA device (on a CPU: Triton's interpreter, TRITON_INTERPRET=1, for tests)"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: on CPU tensors, slowly, for tests (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (9, 0) for Hopper; (0, 0) for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a CUDA device; what the caching allocator holds unused counts as free."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused), int(total)


def tma_refuses(hidden: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernels with tensor descriptors cannot take these [rows, H] and [V_shard, H], or None.

    The copy engine wants rows of whole 16 bytes that begin at a multiple of 16 bytes; half precision because the
    tensor cores would round float32 operands.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float16) and not interpreted():
        return f"{hidden.dtype} would be rounded by the tensor cores"
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.stride(1) != 1 or tensor.stride(0) * tensor.element_size() % 16 or tensor.data_ptr() % 16:
            return f"{name} has rows that are not whole, aligned groups of 16 bytes"
    if hidden.device.type == "cuda" and capability(hidden.device) < (9, 0):
        return f"the device has compute capability {capability(hidden.device)}, below (9, 0)"
    return None
