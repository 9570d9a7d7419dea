"""Loading a Hugging Face folder into this rank's model chunks, and the same weights as a stream back out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import PretrainedConfig

from megatron_laser.config import ModelFolderError
from megatron_laser.config.model_folder.parameters import tensor_shapes
from megatron_laser.model import platform
from megatron_laser.model.hf_config import architecture_of
from megatron_laser.model.hf_folder import HfFolder
from megatron_laser.model.mapping import OUTPUT_LAYER, Geometry, Rule, global_names, rules

_PACE = 8  # parameters that a rank may gather ahead of the first one


@torch.no_grad()
def load_weights(
    chunks: Sequence[torch.nn.Module], folder: HfFolder, config: PretrainedConfig, geometry: Geometry
) -> None:
    """Copy this rank's shards from `folder`; every parameter must be covered by a rule. Call on all ranks.

    Raises ModelFolderError, on every rank, when the folder's tensors are not all, or not only, those of `config`, when
    a shape differs, or when a rank has read NaN or infinity.
    """
    trouble = ""
    try:
        folder.require(architecture_of(config))
    except ModelFolderError as error:  # perhaps of this node's copy alone
        trouble = str(error)
    _agree(trouble)
    parameters = global_names(chunks)
    for rule in rules(config):
        parameter = parameters.pop(rule.megatron, None)
        if parameter is None:
            continue  # on another pipeline stage, or another rank's expert
        try:
            parameter.copy_(rule.layout.load(folder, rule.hf, rule.geometry(geometry), tensor_rank(rule)))
        except ModelFolderError as error:  # perhaps of this rank's part alone
            trouble = trouble or str(error)
    if parameters:
        raise KeyError(f"no rule for {config.model_type} parameters {sorted(parameters)}")
    _agree(trouble)


def tensor_rank(rule: Rule) -> int:
    """Which tensor-parallel shard of a rule's parameter this rank has."""
    if rule.expert is None:
        return parallel_state.get_tensor_model_parallel_rank()
    return parallel_state.get_expert_tensor_parallel_rank()


def _agree(trouble: str) -> None:
    """Raises ModelFolderError on every rank when one of them has `trouble`."""
    all_trouble: list[str | None] = [trouble]
    if dist.get_world_size() > 1:
        all_trouble = [None] * dist.get_world_size()
        dist.all_gather_object(all_trouble, trouble)
    if found := list(dict.fromkeys(filter(None, all_trouble))):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ModelFolderError(found[0] + more)


@dataclass(frozen=True)
class _Unit:
    """What is gathered at once: one parameter, or one of each expert-parallel rank, `rules` in the ranks' order."""

    key: str
    rules: tuple[Rule, ...]

    @property
    def of_experts(self) -> bool:
        return self.rules[0].expert is not None


def _units(exported: Sequence[Rule], experts_per_rank: int) -> list[_Unit]:
    units: dict[str, list[Rule]] = {}
    for rule in exported:
        key = rule.megatron
        if rule.expert is not None:
            key = key.replace(f".experts.{rule.expert}.", f".experts.[{rule.expert % experts_per_rank}].")
        units.setdefault(key, []).append(rule)
    return [_Unit(key, tuple(members)) for key, members in units.items()]


class WeightExporter:
    """The trained weights as a stream of (Hugging Face name, full tensor) on global rank 0.

    All ranks of the first data-parallel replica, of experts and of everything else, must iterate the stream together;
    the other ranks, and those outside that replica, get an empty stream. One parameter is gathered at a time, of
    experts one from each expert-parallel rank, so the extra memory is that much. The order is that of `rules`, but for
    experts, of which those come together that have the same place on their ranks.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], config: PretrainedConfig, geometry: Geometry
    ) -> None:
        moe = architecture_of(config).moe
        ranks = parallel_state.get_expert_model_parallel_world_size()
        exported = [rule for rule in rules(config) if rule.exported]
        self._units = _units(exported, moe.num_experts // ranks if moe else 1)
        parameters = global_names(chunks)
        places = {rule.megatron: unit.key for unit in self._units for rule in unit.rules}
        self._parameters = {places.get(name, name): parameter for name, parameter in parameters.items()}
        self._geometry = geometry
        self._shapes = tensor_shapes(architecture_of(config))
        self._tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self._pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        self._replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        self._expert_replica = parallel_state.get_expert_data_parallel_rank() == 0
        if len(types := {parameter.dtype for parameter in parameters.values()}) > 1:
            raise TypeError(f"parameters of several types: {sorted(map(str, types))}")
        self._owners = self._find_owners()
        forgotten = self._owners.keys() ^ {unit.key for unit in self._units}
        if config.tie_word_embeddings:
            forgotten.discard(OUTPUT_LAYER)
        if forgotten:
            raise KeyError(f"{config.model_type} parameters and rules disagree about {sorted(forgotten)}")

    def _find_owners(self) -> dict[str, int]:
        """Which pipeline rank holds each parameter (the first one, for a tied embedding)."""
        size = parallel_state.get_pipeline_model_parallel_world_size()
        names: list[list[str] | None] = [None] * size
        if size > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.all_gather_object(names, list(self._parameters), group=group)
        else:
            names = [list(self._parameters)]
        owners: dict[str, int] = {}
        for stage, held in enumerate(names):
            for name in held or []:
                owners.setdefault(name, stage)
        return owners

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) on global rank 0; run the collectives and yield nothing elsewhere.

        A yielded tensor may share memory with the model: copy it before the next optimizer step.
        """
        first_of_stage = self._replica and self._tp_rank == 0
        for count, unit in enumerate(self._units, start=1):
            if not (self._expert_replica if unit.of_experts else self._replica):
                continue
            if count % _PACE == 0 and not (first_of_stage and self._pp_rank == 0):
                # Else all gathers of a stream would be queued at once, and NCCL's watchdog counts a collective's time
                # from there. The first rank must not wait for its device: a broadcast to servers may hang on it.
                platform.synchronize()
            owner = self._owners[unit.key]
            tensors = self._gather(unit, wanted=first_of_stage) if owner == self._pp_rank else []
            if not first_of_stage:
                continue
            names = [name for rule in unit.rules for name in rule.hf]
            if owner != 0:
                tensors = self._to_first_stage(names, tensors, owner)
            if self._pp_rank == 0:
                yield from zip(names, tensors, strict=True)

    def _gather(self, unit: _Unit, *, wanted: bool) -> list[torch.Tensor]:
        """The unit's Hugging Face tensors where they are `wanted`; a collective of the ranks that share it."""
        local = self._parameters[unit.key].detach()
        if unit.of_experts:
            group = parallel_state.get_expert_tensor_and_model_parallel_group()
        else:
            group = parallel_state.get_tensor_model_parallel_group()
        shards = [local]
        if group.size() > 1:
            shards = [torch.empty_like(local) for _ in range(group.size())]
            dist.all_gather(shards, local.contiguous(), group=group)
        if not wanted:
            return []
        geometry = unit.rules[0].geometry(self._geometry)
        # The group's ranks are in order of expert-parallel ranks, each with its tensor-parallel shards.
        return [
            tensor
            for place, rule in enumerate(unit.rules)
            for tensor in rule.layout.export(
                shards[place * geometry.tensor : (place + 1) * geometry.tensor], geometry
            )
        ]

    def _to_first_stage(
        self, names: list[str], tensors: list[torch.Tensor], owner: int
    ) -> list[torch.Tensor]:
        """The `tensors` called `names` of stage `owner`, on the first one.

        Their shapes are known there, and parameters have one type: telling them for each of a model's thousands of
        experts would take longer than sending the weights.
        """
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = dist.get_process_group_ranks(group)
        if self._pp_rank == owner:
            for tensor in tensors:
                dist.send(tensor.contiguous(), dst=ranks[0], group=group)
            return []
        if self._pp_rank != 0:
            return []
        own = next(iter(self._parameters.values()))
        received = [torch.empty(self._shapes[name], dtype=own.dtype, device=own.device) for name in names]
        for tensor in received:
            dist.recv(tensor, src=ranks[owner], group=group)
        return received
