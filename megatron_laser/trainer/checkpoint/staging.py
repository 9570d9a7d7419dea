"""From the device to host memory before a save, one parameter at a time.

Every parameter of a model-parallel rank is held by all its data-parallel ranks; one of them, its owner, stores it, so
that the ranks write about equally much. Under the distributed optimizer the owner gets the others' slices through a
buffer of `CHUNK_ELEMENTS` float32 numbers, which is all that a save takes on the device. In host memory a rank
holds its share of the state (14 bytes a parameter in bf16, divided by the data-parallel size) until it is written,
and a page-locked buffer of its largest parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_laser.model.mapping import Rule
from megatron_laser.trainer.checkpoint import optimizer_state
from megatron_laser.trainer.policy import Policy

WEIGHTS = "weights"
CHUNK_ELEMENTS = 16 * 2**20


@dataclass(frozen=True)
class Block:
    """One parameter of this rank, with its rule."""

    rule: Rule
    parameter: torch.nn.Parameter
    owned: bool  # False for the copy of a tied embedding on the last pipeline stage: loaded, not stored


# (prefix, rule, this rank's shard in host memory) -> what is stored of it
Cut = Callable[[str, Rule, torch.Tensor], dict[str, ShardedTensor]]


class Stager:
    """One save's copies. Making it allocates and runs no collective; `stage` runs them."""

    def __init__(self, policy: Policy, blocks: Sequence[Block], cut: Cut, *, copy: bool) -> None:
        """`blocks`: what this rank's data-parallel group stores, in the same order on all of its ranks."""
        self._blocks, self._cut = blocks, cut
        self._places = optimizer_state.places(policy.optimizer)
        # fp32 training updates the weights themselves: there is no other main copy.
        main = (optimizer_state.MAIN,) if policy.chunks.config.bf16 else ()
        self._kinds = [*main, optimizer_state.EXP_AVG, optimizer_state.EXP_AVG_SQ]
        self._rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        self._owners = owners([block.parameter.numel() for block in blocks], size)
        largest = max((block.parameter.numel() for block in blocks), default=0)
        device = blocks[0].parameter.device if blocks else torch.device("cpu")
        self._copy = copy or device.type != "cpu"
        gathers = any(self._places[id(block.parameter)].group is not None for block in blocks)
        self._chunk = torch.empty(min(largest, CHUNK_ELEMENTS) if gathers else 0, device=device)
        self._host = host_buffer(largest if self._copy or gathers else 0, pinned=device.type == "cuda")

    @torch.no_grad()
    def stage(self) -> dict[str, ShardedTensor]:
        """The tensors that this rank stores. A collective on each data-parallel group.

        Raises what went wrong on this rank, after the last collective: the others are not left waiting.
        """
        entries: dict[str, ShardedTensor] = {}
        trouble: Exception | None = None
        for block, owner in zip(self._blocks, self._owners, strict=True):
            place, parameter = self._places[id(block.parameter)], block.parameter.detach()
            for kind in (None, *self._kinds):
                if kind is not None and place.group is not None:
                    self._gather(place, kind, parameter.numel(), owner)
                if owner != self._rank or trouble is not None:
                    continue
                try:
                    prefix = WEIGHTS if kind is None else f"optimizer.{kind}"
                    entries |= self._stored(prefix, block, self._shard(place, kind, parameter))
                except Exception as error:
                    trouble = error
                    entries.clear()
        if trouble is not None:
            raise trouble
        return entries

    def _shard(self, place: optimizer_state.Place, kind: str | None, parameter: torch.Tensor) -> torch.Tensor:
        """The tensor in host memory: in the buffer, or the live one where no copy is asked for."""
        if kind is not None and place.group is not None:
            return self._host[: parameter.numel()].view(parameter.shape)
        live = parameter.flatten() if kind is None else place.whole(kind)
        if not self._copy:
            return live.view(parameter.shape)
        host = self._host.view(live.dtype)[: live.numel()]
        host.copy_(live)
        return host.view(parameter.shape)

    def _stored(self, prefix: str, block: Block, shard: torch.Tensor) -> dict[str, ShardedTensor]:
        entries = self._cut(prefix, block.rule, shard)
        buffer = self._host.untyped_storage().data_ptr()
        for entry in entries.values():  # a norm is not cut: it still lies in the buffer
            if self._host.numel() and entry.data.untyped_storage().data_ptr() == buffer:
                entry.data = entry.data.clone()
        return entries

    def _gather(self, place: optimizer_state.Place, kind: str, elements: int, owner: int) -> None:
        """Fill the owner's host buffer with the slices of all ranks, a chunk at a time."""
        for start in range(0, elements, len(self._chunk)):
            stop = min(start + len(self._chunk), elements)
            chunk = self._chunk[: stop - start].zero_()
            part = place.part(kind, start, stop)
            if part is not None:
                first, values = part
                chunk[first - start : first - start + len(values)] = values
            # Added as integers, zeros leave every bit as it is: -0.0 and NaN, too.
            dist.reduce(chunk.view(torch.int32), group_dst=owner, group=place.group)
            if owner == self._rank:
                self._host[start:stop].copy_(chunk)


def owners(elements: Sequence[int], ranks: int) -> list[int]:
    """For each parameter of so many elements the rank that stores it: the largest first, to whom has least."""
    load = [0] * ranks
    found = [0] * len(elements)
    for index in sorted(range(len(elements)), key=lambda index: -elements[index]):
        found[index] = min(range(ranks), key=load.__getitem__)
        load[found[index]] += elements[index]
    return found


def host_buffer(elements: int, *, pinned: bool) -> torch.Tensor:
    """[elements] float32 in host memory."""
    return torch.empty(elements, dtype=torch.float32, pin_memory=pinned)
