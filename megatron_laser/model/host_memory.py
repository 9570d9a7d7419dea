"""Page-locked host memory for copies of what leaves the device for a while."""

from __future__ import annotations

import torch

from megatron_laser.errors import ConfigError

_SMALLEST_PIECE = 2**20  # bytes


def host_pieces(nbytes: int) -> list[int]:
    """Sizes of the host buffers for `nbytes` bytes, largest first: powers of two, of 1 MiB or more.

    torch rounds every pinned allocation up to a power of two (CachingHostAllocator), which for one buffer is up to
    twice its size; of these pieces less than 1 MiB is lost.
    """
    rounded = -(-nbytes // _SMALLEST_PIECE) * _SMALLEST_PIECE
    return [1 << bit for bit in reversed(range(rounded.bit_length())) if rounded >> bit & 1]


def host_buffers(nbytes: int, *, pinned: bool, piece: int | None = None) -> list[torch.Tensor]:
    """Buffers of uint8 for `nbytes` bytes, in order: as `host_pieces` says, or all of `piece` bytes."""
    sizes = host_pieces(nbytes) if piece is None else [piece] * -(-nbytes // piece)
    return [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]


def copy_pieces(host: list[torch.Tensor], device: torch.Tensor, *, to_host: bool) -> None:
    """Between `device` [nbytes] uint8 and `host`, which has at least as many, in order; the copies are only begun."""
    begin = 0
    for piece in host:
        part = device[begin : begin + piece.numel()]
        begin += part.numel()
        if to_host:
            piece[: part.numel()].copy_(part, non_blocking=True)
        else:
            part.copy_(piece[: part.numel()], non_blocking=True)


def require_pinned_memory(setting: str) -> None:
    """Raises ConfigError where this process gets no page-locked memory, without which copies would not run beside work.

    setting: what needs it, in the words of the configuration.
    """
    try:
        torch.empty(_SMALLEST_PIECE, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            [
                f"{setting} needs page-locked (pinned) host memory, and this process gets none: {reason}. Raise the "
                "container's or the node's limit (ulimit -l, --ulimit memlock=-1), or turn the setting off"
            ]
        ) from error
