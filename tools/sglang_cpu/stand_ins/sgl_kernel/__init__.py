"""Stand-in for sgl-kernel's CPU build, which package indexes do not have: the one function that a text server uses.

SGLang imports many names of this module and calls one of them on a CPU with torch's own attention and sampling.
Every other name can be imported, and fails loudly when it is called.
"""

import torch

__version__ = "0.0.0+stand.in"


class _NoCudaRuntime:
    """What SGLang asks of the CUDA runtime where it keeps the experts that tokens were sent to, on a CPU as well:
    its buffer in host memory is pinned. Here no device copies into it."""

    @staticmethod
    def cudaHostRegister(pointer: int, size: int, flags: int) -> int:
        return 0

    @staticmethod
    def cudaHostUnregister(pointer: int) -> int:
        return 0


if not torch.backends.cuda.is_built():
    torch.cuda.cudart = _NoCudaRuntime


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    *_: object,
) -> None:
    """Enter each request's new cache slots into its row of the table, in place.

    Args:
        req_pool_indices: [requests], the requests' rows.
        req_to_token: [rows, longest sequence], the table of slots.
        start_offset: [requests], first new position of each request.
        end_offset: [requests], the position behind its last new one.
        out_cache_loc: [new tokens], the slots, one request after the other.
    """
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*_: object, **__: object) -> None:
        raise RuntimeError(
            f"sgl_kernel.{name} is not in the stand-in of the CPU environment (tools/sglang_cpu): this model or "
            "option needs a real build of sgl-kernel"
        )

    unavailable.__name__ = unavailable.__qualname__ = name
    return unavailable
