"""Loading a Hugging Face folder into this rank's model chunks, and the same weights as a stream back out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import PretrainedConfig

from megatron_laser.config import ModelFolderError
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
    rank = parallel_state.get_tensor_model_parallel_rank()
    for rule in rules(config):
        parameter = parameters.pop(rule.megatron, None)
        if parameter is None:
            continue  # on another pipeline stage
        try:
            parameter.copy_(rule.layout.load(folder, rule.hf, geometry, rank))
        except ModelFolderError as error:  # perhaps of this rank's part alone
            trouble = trouble or str(error)
    if parameters:
        raise KeyError(f"no rule for {config.model_type} parameters {sorted(parameters)}")
    _agree(trouble)


def _agree(trouble: str) -> None:
    """Raises ModelFolderError on every rank when one of them has `trouble`."""
    all_trouble: list[str | None] = [trouble]
    if dist.get_world_size() > 1:
        all_trouble = [None] * dist.get_world_size()
        dist.all_gather_object(all_trouble, trouble)
    if found := list(dict.fromkeys(filter(None, all_trouble))):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ModelFolderError(found[0] + more)


class WeightExporter:
    """The trained weights as a stream of (Hugging Face name, full tensor) on global rank 0.

    All ranks of the first data-parallel replica must iterate the stream together; the other ranks, and those
    outside that replica, get an empty stream. One parameter is gathered at a time, so the extra memory is one
    full parameter. The order is that of `rules`.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], config: PretrainedConfig, geometry: Geometry
    ) -> None:
        self._parameters = global_names(chunks)
        self._rules = [rule for rule in rules(config) if rule.exported]
        self._geometry = geometry
        self._tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self._pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        self._owners = self._find_owners()
        exported = {rule.megatron for rule in self._rules}
        forgotten = self._owners.keys() ^ exported
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
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
            return
        for count, rule in enumerate(self._rules, start=1):
            if count % _PACE == 0 and (self._tp_rank, self._pp_rank) != (0, 0):
                # Else all gathers of a stream would be queued at once, and NCCL's watchdog counts a collective's time
                # from there. The first rank must not wait for its device: a broadcast to servers may hang on it.
                platform.synchronize()
            owner = self._owners[rule.megatron]
            tensors = self._gather(rule) if owner == self._pp_rank else []
            if self._tp_rank != 0:
                continue
            if owner != 0:
                tensors = self._to_first_stage(tensors, owner)
            if self._pp_rank == 0:
                yield from zip(rule.hf, tensors, strict=True)

    def _gather(self, rule: Rule) -> list[torch.Tensor]:
        local = self._parameters[rule.megatron].detach()
        if self._geometry.tensor == 1:
            return rule.layout.export([local], self._geometry)
        shards = [torch.empty_like(local) for _ in range(self._geometry.tensor)]
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_gather(shards, local.contiguous(), group=group)
        return rule.layout.export(shards, self._geometry) if self._tp_rank == 0 else []

    def _to_first_stage(self, tensors: list[torch.Tensor], owner: int) -> list[torch.Tensor]:
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = dist.get_process_group_ranks(group)
        if self._pp_rank == owner:
            dist.send_object_list([[(t.shape, t.dtype) for t in tensors]], dst=ranks[0], group=group)
            for tensor in tensors:
                dist.send(tensor.contiguous(), dst=ranks[0], group=group)
            return []
        if self._pp_rank != 0:
            return []
        box: list = [None]
        dist.recv_object_list(box, src=ranks[owner], group=group)
        device = next(iter(self._parameters.values())).device
        received = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in box[0]]
        for tensor in received:
            dist.recv(tensor, src=ranks[owner], group=group)
        return received
