"""Which parts of the trainer's state are in device memory, for trainers that share their GPUs with servers.

A part leaves the device by its storages: their bytes go to pinned host memory and they shrink to nothing. Tensors,
views, buckets and optimizer keep pointing at the same storages, so nothing has to be rebuilt when the bytes return.
(Megatron's own `offload_to_cpu` of optimizers exchanges `param.data`, which tears fp32 weights out of DDP's buffers.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_laser.model import platform
from megatron_laser.model.host_memory import copy_pieces, host_buffers
from megatron_laser.trainer.chunks import Chunks
from megatron_laser.trainer.optimizer_state import torch_optimizers


class Part(Enum):
    """A part of the trainer's state.

    `PARAMETERS`: the policy's weights. `REFERENCE`: those of the reference model. `GRADIENTS`: DDP's buffers; their
    contents are garbage between two updates, so they are freed and come back as zeros. `OPTIMIZER`: Adam's moments,
    and the fp32 weights of a bf16 model.
    """

    PARAMETERS = "parameters"
    REFERENCE = "reference model"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer state"


ALL_PARTS = frozenset(Part)


@dataclass
class _Parked:
    """A storage that is not on the device. `host`: its bytes, in pieces of uint8; None: zeros."""

    storage: torch.UntypedStorage
    nbytes: int
    host: list[torch.Tensor] | None


class StateOffload:
    """Moves parts of this rank's state between device and host. A part that is away must not be used."""

    def __init__(self, chunks: Chunks, optimizer: MegatronOptimizer, reference: Chunks | None = None) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self.reference = reference
        self._device = platform.device()
        self._parked: dict[Part, list[_Parked]] = {}
        # Pinning memory takes longer than filling it: host buffers are kept, by the storage that they belong to.
        self._hosts: dict[int, tuple[torch.UntypedStorage, list[torch.Tensor]]] = {}

    @property
    def on_device(self) -> frozenset[Part]:
        """The parts that can be used."""
        return ALL_PARTS - frozenset(self._parked)

    def offload(self, parts: Collection[Part], *, for_others: bool = True) -> int:
        """Take `parts` off the device; those that are away already stay so. Returns the bytes that became free.

        for_others: other processes are to have them; else this one's allocator keeps them for what comes next.
        """
        leaving = [part for part in Part if part in parts and part not in self._parked]
        if not leaving:
            return 0
        if Part.GRADIENTS in leaving:
            self._optimizer.zero_grad()  # references from the main weights into the buffers
        self._drop_fp8_copies(leaving)
        storages = {part: self._storages(part) for part in leaving}
        platform.synchronize()  # queued kernels may still write
        for part in leaving:
            self._parked[part] = [
                _Parked(storage, storage.nbytes(), None if part is Part.GRADIENTS else self._copy(storage))
                for storage in storages[part]
            ]
        platform.synchronize()
        freed = 0
        for part in leaving:
            for parked in self._parked[part]:
                parked.storage.resize_(0)
                freed += parked.nbytes
        if for_others:
            platform.empty_cache()
        return freed

    def onload(self, parts: Collection[Part]) -> int:
        """Bring `parts` back to the device, bit for bit (gradients as zeros). Returns the bytes that they take."""
        taken = 0
        for part in Part:
            if part not in parts:
                continue
            for parked in self._parked.pop(part, []):
                parked.storage.resize_(parked.nbytes)
                target = _bytes_of(parked.storage)
                if parked.host is None:
                    target.zero_()
                else:
                    copy_pieces(parked.host, target, to_host=False)
                taken += parked.nbytes
        platform.synchronize()
        return taken

    def _drop_fp8_copies(self, leaving: Collection[Part]) -> None:
        """Of weights that leave: Transformer Engine makes them anew in the first micro-batch of each pass."""
        for part, chunks in ((Part.PARAMETERS, self._chunks), (Part.REFERENCE, self.reference)):
            if part in leaving and chunks is not None:
                for model in chunks.models:
                    for module in model.modules():
                        getattr(module, "_fp8_workspaces", {}).clear()  # of TransformerEngineBaseModule

    def _copy(self, storage: torch.UntypedStorage) -> list[torch.Tensor]:
        known = self._hosts.get(storage._cdata)
        if known is None or sum(piece.numel() for piece in known[1]) < storage.nbytes():
            host = host_buffers(storage.nbytes(), pinned=self._device.type == "cuda")
            # The storage is held as well: its address names it, and must not be given to another one.
            known = self._hosts[storage._cdata] = (storage, host)
        copy_pieces(known[1], _bytes_of(storage), to_host=True)
        return known[1]

    def _storages(self, part: Part) -> list[torch.UntypedStorage]:
        """The distinct storages of a part on the device; found anew each time: Adam's appear with its first step."""
        found: dict[int, torch.UntypedStorage] = {}
        others: set[int] = set()
        if part is Part.OPTIMIZER:  # fp32 weights are their own main weights: they belong to the parameters
            others = {tensor.untyped_storage()._cdata for tensor in self._tensors(Part.PARAMETERS)}
        for tensor in self._tensors(part):
            storage = tensor.untyped_storage()
            if tensor.device == self._device and storage._cdata not in others and storage.nbytes() > 0:
                found[storage._cdata] = storage
        return list(found.values())

    def _tensors(self, part: Part) -> Iterator[torch.Tensor]:
        if part is Part.PARAMETERS:
            yield from _parameters(self._chunks)
        elif part is Part.REFERENCE:
            if self.reference is not None:
                yield from _parameters(self.reference)
        elif part is Part.GRADIENTS:
            for module in self._chunks.wrapped:
                for buffer in (*module.buffers, *module.expert_parallel_buffers):  # type: ignore[misc]
                    yield buffer.grad_data
        else:
            for optimizer in torch_optimizers(self._optimizer):
                for group in optimizer.param_groups:
                    yield from group["params"]
                for state in optimizer.state.values():
                    # The count of steps is a number that is read at any time.
                    yield from (
                        value
                        for name, value in state.items()
                        if isinstance(value, torch.Tensor) and name != "step"
                    )


def _parameters(chunks: Chunks) -> Iterator[torch.Tensor]:
    for model in chunks.models:
        yield from model.parameters()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """[nbytes] uint8, a view of the whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
