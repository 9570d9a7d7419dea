"""Weights and optimizer state as tensors under Hugging Face names, between the model and a checkpoint.

Every tensor-parallel shard of a Megatron parameter is a contiguous block of one to three Hugging Face tensors
(a rank's query heads are consecutive rows of q_proj, and so on). So the tensors are stored under their Hugging
Face names: `weights.<name>`, and `optimizer.<kind>.<name>`. A checkpoint then knows nothing of pipeline stages,
fused norms or local and Transformer Engine module names, loads into any layout, and converts to a Hugging Face
folder one tensor at a time. Vocabulary padding belongs to a layout, so its shape may differ between the two.

Every parameter of a model-parallel rank is held by all its data-parallel ranks (an expert's by fewer, those of its
expert-parallel rank); one of them stores it, so that the ranks write about equally much. Under the distributed
optimizer that rank gets the others' slices through a buffer of `CHUNK_ELEMENTS` float32 numbers, which is all that a
save takes on the device. In host memory a rank holds its share of the state (14 bytes a parameter in bf16, divided by
the data-parallel size) until it is written, and a page-locked buffer of its largest parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_laser.model.mapping import (
    Geometry,
    Replicated,
    Row,
    Rule,
    Vocabulary,
    global_names,
    rules,
)
from megatron_laser.model.weights import tensor_rank
from megatron_laser.ops import configure
from megatron_laser.trainer import optimizer_state
from megatron_laser.trainer.checkpoint import torch_dist
from megatron_laser.trainer.checkpoint.collective_errors import on_every_rank
from megatron_laser.trainer.checkpoint.torch_dist import ShardedTensor
from megatron_laser.trainer.offload import Part
from megatron_laser.trainer.policy import Policy

WEIGHTS = "weights"
CHUNK_ELEMENTS = 16 * 2**20
_FROZEN = optimizer_state.Place(None, None)  # of a parameter that is not trained: it has weights and no state


@dataclass(frozen=True)
class MappedParameter:
    """One parameter of this rank, with its rule."""

    rule: Rule
    parameter: torch.nn.Parameter
    owned: bool  # False for the copy of a tied embedding on the last pipeline stage: loaded, not stored


def build_state(
    policy: Policy, *, copy: bool = False, group: dist.ProcessGroup | None = None
) -> dict[str, ShardedTensor]:
    """This rank's share of everything to be stored, in host memory, by its name. A collective.

    Args:
        copy: false: on a CPU, tensors that need no gathering may be the live ones, so write them before the next step.
        group: all ranks (None: the default group), on which they agree that nobody failed.

    Raises:
        CheckpointError: on every rank, with the same text, when memory ran out on one.
    """
    policy.complete_weights()
    parameters = [mapped for mapped in _mapped_parameters(policy) if mapped.owned and _stored_here(mapped)]

    # What goes back to host memory leaves nothing alive of itself here.
    copy = copy or Part.OPTIMIZER not in policy.memory.on_device
    with policy.optimizer_on_device():
        # Whatever can run out of memory on one rank alone does so before the first collective.
        stager = on_every_rank(lambda: Stager(policy, parameters, copy=copy), group)
        return on_every_rank(stager.stage, group)


def load_state(policy: Policy, folder: Path, optimizer_step: int) -> None:
    """Load weights and optimizer state from `folder` into the policy, whatever layout stored them.

    Tensor by tensor: the host holds a few copies of this rank's largest parameter, not of its state. No collective.
    """
    with policy.optimizer_on_device():
        _load_state(policy, folder, optimizer_step)


def _load_state(policy: Policy, folder: Path, optimizer_step: int) -> None:
    geometry = policy.chunks.geometry
    places = optimizer_state.places(policy.optimizer)
    configure(reserved_bytes=optimizer_state.missing_moment_bytes(policy.optimizer))
    reader = torch_dist.Reader(folder)

    def load(prefix: str, mapped: MappedParameter, dtype: torch.dtype) -> torch.Tensor:
        empty = torch.empty(mapped.parameter.shape, dtype=dtype)
        wanted = _sharded(prefix, mapped.rule, empty, geometry)
        reader.read_sharded(wanted)
        loaded = {name: entry.data for name, entry in wanted.items()}
        return _joined(prefix, mapped.rule, loaded, geometry)

    with torch.no_grad():
        for mapped in _mapped_parameters(policy):
            mapped.parameter.copy_(load(WEIGHTS, mapped, mapped.parameter.dtype))
            place = places.get(id(mapped.parameter))
            if place is None or place.slot is None:  # frozen, or another data-parallel rank has its state
                continue
            for kind in optimizer_state.KINDS:
                if kind == optimizer_state.MAIN and not policy.chunks.config.bf16:
                    place.restore(kind, mapped.parameter.detach())
                else:
                    place.restore(kind, load(f"optimizer.{kind}", mapped, torch.float32))
    optimizer_state.set_step(policy.optimizer, optimizer_step)


class Stager:
    """One save's copies. Making it allocates and runs no collective; `stage` runs them."""

    def __init__(self, policy: Policy, parameters: Sequence[MappedParameter], *, copy: bool) -> None:
        """`parameters`: what this rank's data-parallel group stores, in the same order on all of its ranks."""
        self._parameters, self._geometry = parameters, policy.chunks.geometry
        self._places = optimizer_state.places(policy.optimizer)
        # fp32 training updates the weights themselves: there is no other main copy.
        main = (optimizer_state.MAIN,) if policy.chunks.config.bf16 else ()
        self._kinds = [*main, optimizer_state.EXP_AVG, optimizer_state.EXP_AVG_SQ]
        self._stored_by = _storing_ranks(parameters)
        largest = max((mapped.parameter.numel() for mapped in parameters), default=0)
        device = parameters[0].parameter.device if parameters else torch.device("cpu")
        self._copy = copy or device.type != "cpu"
        gathers = any(place.group is not None for place in self._places.values())
        self._chunk = torch.empty(min(largest, CHUNK_ELEMENTS) if gathers else 0, device=device)
        self._host = host_buffer(largest if self._copy or gathers else 0, pinned=device.type == "cuda")

    @torch.no_grad()
    def stage(self) -> dict[str, ShardedTensor]:
        """The tensors that this rank stores. A collective on each data-parallel group.

        Raises what went wrong on this rank, after the last collective: the others are not left waiting.
        """
        entries: dict[str, ShardedTensor] = {}
        trouble: Exception | None = None
        for mapped, (storing, own_rank) in zip(self._parameters, self._stored_by, strict=True):
            place, parameter = self._places.get(id(mapped.parameter), _FROZEN), mapped.parameter.detach()
            for kind in (None, *self._kinds) if place is not _FROZEN else (None,):
                if kind is not None and place.group is not None:
                    self._gather(place, kind, parameter.numel(), storing, own_rank)
                if storing != own_rank or trouble is not None:
                    continue
                try:
                    prefix = WEIGHTS if kind is None else f"optimizer.{kind}"
                    entries |= self._stored(prefix, mapped, self._shard(place, kind, parameter))
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
        # Moments in bfloat16 are stored as they would be in float32, so that a resumed run may keep them otherwise.
        live = parameter.flatten() if kind is None else place.whole(kind).float()
        if not self._copy:
            return live.view(parameter.shape)
        host = self._host.view(live.dtype)[: live.numel()]
        host.copy_(live)
        return host.view(parameter.shape)

    def _stored(self, prefix: str, mapped: MappedParameter, shard: torch.Tensor) -> dict[str, ShardedTensor]:
        entries = _sharded(prefix, mapped.rule, shard, self._geometry)
        buffer = self._host.untyped_storage().data_ptr()
        for entry in entries.values():  # a norm is not cut: it still lies in the buffer
            if self._host.numel() and entry.data.untyped_storage().data_ptr() == buffer:
                entry.data = entry.data.clone()
        return entries

    def _gather(
        self, place: optimizer_state.Place, kind: str, elements: int, storing: int, own_rank: int
    ) -> None:
        """Fill the host buffer of the rank that is `storing` it with the slices of all ranks, a chunk at a time."""
        for start in range(0, elements, len(self._chunk)):
            stop = min(start + len(self._chunk), elements)
            chunk = self._chunk[: stop - start].zero_()
            part = place.part(kind, start, stop)
            if part is not None:
                first, values = part
                chunk[first - start : first - start + len(values)] = values
            # Added as integers, zeros leave every bit as it is: -0.0 and NaN, too.
            dist.reduce(chunk.view(torch.int32), group_dst=storing, group=place.group)
            if storing == own_rank:
                self._host[start:stop].copy_(chunk)


def _storing_ranks(parameters: Sequence[MappedParameter]) -> list[tuple[int, int]]:
    """For each parameter (the rank that stores it, this rank), both in the group of the ranks that hold it."""
    dense = (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    experts = (
        parallel_state.get_expert_data_parallel_rank(),
        parallel_state.get_expert_data_parallel_world_size(),
    )
    found: dict[int, tuple[int, int]] = {}
    for of_experts, (rank, size) in ((False, dense), (True, experts)):
        chosen = [i for i, mapped in enumerate(parameters) if (mapped.rule.expert is not None) == of_experts]
        storing = storing_ranks([parameters[i].parameter.numel() for i in chosen], size)
        found |= {i: (storer, rank) for i, storer in zip(chosen, storing, strict=True)}
    return [found[i] for i in range(len(parameters))]


def storing_ranks(elements: Sequence[int], ranks: int) -> list[int]:
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


def _mapped_parameters(policy: Policy) -> Iterator[MappedParameter]:
    parameters = global_names(policy.chunks.models)
    for rule in rules(policy.chunks.hf):
        parameter = parameters.get(rule.megatron)
        if parameter is not None:
            yield MappedParameter(rule, parameter, owned=rule.exported)


def _stored_here(mapped: MappedParameter) -> bool:
    """Norms are the same on all tensor-parallel ranks: the first one stores them."""
    replicated = isinstance(mapped.rule.layout, Replicated)
    return not replicated or parallel_state.get_tensor_model_parallel_rank() == 0


def _local(geometry: Geometry) -> Geometry:
    """The geometry of one shard, as if it were a whole, unpadded model."""
    tp = geometry.tensor
    return replace(
        geometry,
        heads=geometry.heads // tp,
        kv_heads=geometry.kv_heads // tp,
        ffn=geometry.ffn // tp,
        vocab=geometry.padded_vocab // tp,
        padded_vocab=geometry.padded_vocab // tp,
        tensor=1,
    )


def _sharded(prefix: str, rule: Rule, shard: torch.Tensor, geometry: Geometry) -> dict[str, ShardedTensor]:
    """The Hugging Face blocks of one shard, placed in their global tensors."""
    axis = None if isinstance(rule.layout, Replicated) else int(isinstance(rule.layout, Row))
    geometry = rule.geometry(geometry)
    pieces = rule.layout.export([shard], _local(geometry))
    return {
        f"{prefix}.{name}": torch_dist.sharded_tensor(
            f"{prefix}.{name}",
            piece.contiguous(),
            axis=axis,
            rank=tensor_rank(rule),
            ranks=geometry.tensor,
            allow_shape_mismatch=isinstance(rule.layout, Vocabulary),
        )
        for name, piece in zip(rule.hf, pieces, strict=True)
    }


class _Pieces:
    """A TensorReader over the blocks of one shard."""

    def __init__(self, prefix: str, loaded: Mapping[str, Any]) -> None:
        self._prefix, self._loaded = prefix, loaded

    def full(self, name: str) -> torch.Tensor:
        return self._loaded[f"{self._prefix}.{name}"]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.full(name)[start:stop]

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.full(name)[:, start:stop]


def _joined(prefix: str, rule: Rule, loaded: Mapping[str, Any], geometry: Geometry) -> torch.Tensor:
    return rule.layout.load(_Pieces(prefix, loaded), rule.hf, _local(rule.geometry(geometry)), 0)
