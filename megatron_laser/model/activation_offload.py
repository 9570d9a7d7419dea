"""Layers' inputs in host memory from the forward to the backward pass, copied beside the computation.

With `recompute: full` the input of each layer is all that the backward needs of it. Autograd hands it over to be saved;
here its bytes go to page-locked memory on a stream of their own, and come back, one layer ahead, when the backward
asks for them. Before a layer begins, the copy of the input before its own must have ended: so the GPU holds two of
them, and where copies are slower than layers (small layers, a slow bus), the layers wait.

Megatron's own fine-grained offloading (`fine_grained_activation_offload.py`, read in Megatron-Core 0.19.2) learns in
its first pass how many micro-batches a step has and what they save, and keeps to it: here their number changes from
step to step, and the first pass is one without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_laser.model import platform
from megatron_laser.model.host_memory import copy_pieces, host_buffers

#: Bytes of a host buffer. One size for all: torch keeps page-locked memory by its size, and micro-batches differ.
PIECE = 8 * 2**20


@dataclass(eq=False)
class _Parked:
    """A tensor whose bytes are in `host`, and, from its prefetch on, in `device` too, once `ready` has happened."""

    place: int
    like: torch.Tensor  # shape and dtype, without memory (on the meta device)
    host: list[torch.Tensor]
    device: torch.Tensor | None = None
    ready: Any = None


class _Pass:
    """What one forward pass of a model chunk saved, in order."""

    def __init__(self, stream: Any, staying: frozenset[int]) -> None:
        """stream: for copies, None on a CPU. staying: storages that are not to be moved, the parameters'."""
        self._stream, self._staying = stream, staying
        self._saved: list[_Parked | None] = []
        self._leaving: tuple[torch.Tensor, Any] | None = None  # what is being copied, and when it has been

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Parked:
        """Autograd's hook: what is kept in place of `tensor`."""
        # What has no gradient is shared by all layers, such as the rotary angles.
        if not tensor.requires_grad or tensor.untyped_storage().data_ptr() in self._staying:
            return tensor
        source = tensor.detach().contiguous()
        host = host_buffers(source.nbytes, pinned=self._stream is not None, piece=PIECE)
        with platform.beside(self._stream) as copies:
            copy_pieces(host, _bytes(source), to_host=True)
            copied = None if copies is None else copies.record_event()
        if self._leaving is not None:
            platform.wait_for(self._leaving[1])
        # Held until its copy is waited for: its memory must not be used again before.
        self._leaving = (source, copied) if copied is not None else None
        parked = _Parked(len(self._saved), torch.empty_like(source, device="meta"), host)
        self._saved.append(parked)
        return parked

    def unpack(self, saved: torch.Tensor | _Parked) -> torch.Tensor:
        """Autograd's hook: the tensor again. The one saved before it is the next to be asked for."""
        if isinstance(saved, torch.Tensor):
            return saved
        self._fetch(saved)
        self._saved[saved.place] = None  # from here on only autograd's node has it
        before = self._saved[saved.place - 1] if saved.place else None
        tensor, saved.device = saved.device, None
        platform.wait_for(saved.ready)
        if before is not None:
            self._fetch(before)
        assert tensor is not None
        return tensor

    def _fetch(self, parked: _Parked) -> None:
        if parked.device is not None:
            return
        parked.device = torch.empty_like(parked.like, device=platform.device())
        with platform.beside(self._stream) as copies:
            copy_pieces(parked.host, _bytes(parked.device), to_host=False)
            parked.ready = None if copies is None else copies.record_event()


def offloading(model: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which runs the layers of `model`, with what autograd saves in it in host memory."""
    stream = platform.new_stream()

    def run(*args: Any, **kwargs: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        staying = frozenset(parameter.untyped_storage().data_ptr() for parameter in model.parameters())
        saved = _Pass(stream, staying)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            return forward(*args, **kwargs)

    return run


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[nbytes] uint8, a view."""
    return tensor.view(-1).view(torch.uint8)
