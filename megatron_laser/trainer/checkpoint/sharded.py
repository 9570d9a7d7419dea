"""The sharded part of a checkpoint: weights and optimizer state under Hugging Face names.

Every tensor-parallel shard of a Megatron parameter is a contiguous block of one to three Hugging Face tensors
(a rank's query heads are consecutive rows of q_proj, and so on). So the tensors are stored under their Hugging
Face names: `weights.<name>`, and `optimizer.<kind>.<name>`. A checkpoint then knows nothing of pipeline stages,
fused norms or local and Transformer Engine module names, loads into any layout, and converts to a Hugging Face
folder one tensor at a time. Vocabulary padding belongs to a layout, so its shape may differ between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

from megatron_laser.model.mapping import Geometry, Replicated, Row, Rule, Vocabulary, global_names, rules
from megatron_laser.trainer.checkpoint import optimizer_state
from megatron_laser.trainer.checkpoint.reading import IndexedReader, without_collectives
from megatron_laser.trainer.checkpoint.staging import WEIGHTS, Block, Stager
from megatron_laser.trainer.checkpoint.together import everywhere, readable_errors
from megatron_laser.trainer.policy import Policy


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
    for module in policy.chunks.wrapped:
        if module.ddp_config.overlap_param_gather:  # else the weights are those before the last update
            module.start_param_sync(force_sync=True)
    blocks = [block for block in _blocks(policy) if block.owned and _stored_here(block)]

    def cut(prefix: str, rule: Rule, shard: torch.Tensor) -> dict[str, ShardedTensor]:
        return _sharded(prefix, rule, shard, policy.chunks.geometry)

    # Whatever can run out of memory on one rank alone does so before the first collective.
    stager = everywhere(lambda: Stager(policy, blocks, cut, copy=copy), group)
    return everywhere(stager.stage, group)


def load_state(policy: Policy, folder: Path, optimizer_step: int) -> None:
    """Load weights and optimizer state from `folder` into the policy, whatever layout stored them.

    Tensor by tensor: the host holds a few copies of this rank's largest parameter, not of its state. No collective.
    """
    geometry = policy.chunks.geometry
    places = optimizer_state.places(policy.optimizer)
    reader = IndexedReader(folder)

    def load(prefix: str, block: Block, dtype: torch.dtype) -> torch.Tensor:
        empty = torch.empty(block.parameter.shape, dtype=dtype)
        wanted = _sharded(prefix, block.rule, empty, geometry)
        _read(reader, wanted)
        loaded = {name: entry.data for name, entry in wanted.items()}
        return _joined(prefix, block.rule, loaded, geometry)

    with torch.no_grad():
        for block in _blocks(policy):
            place = places[id(block.parameter)]
            block.parameter.copy_(load(WEIGHTS, block, block.parameter.dtype))
            if place.slot is None:  # another data-parallel rank has the state of this parameter
                continue
            for kind in optimizer_state.KINDS:
                if kind == optimizer_state.MAIN and not policy.chunks.config.bf16:
                    place.restore(kind, block.parameter.detach())
                else:
                    place.restore(kind, load(f"optimizer.{kind}", block, torch.float32))
    optimizer_state.set_step(policy.optimizer, optimizer_step)


def _read(reader: IndexedReader, wanted: dict[str, ShardedTensor]) -> None:
    """Fill the tensors of `wanted`; rows that the checkpoint does not have (vocabulary padding) become zeros."""
    with without_collectives():
        dcp.load(
            torch_strategies.mcore_to_pyt_state_dict({key: [entry] for key, entry in wanted.items()}, True),
            storage_reader=reader,
            planner=torch_strategies.MCoreLoadPlanner(
                shapes_validation_sharded_tensors=[e for e in wanted.values() if not e.allow_shape_mismatch],
                allow_shape_mismatch_sharded_tensors={
                    key: entry for key, entry in wanted.items() if entry.allow_shape_mismatch
                },
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
            no_dist=True,
        )


def save_state(entries: dict[str, ShardedTensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Write `entries` in Megatron's torch_dist format into the existing, empty `folder`. A collective on `group`.

    Megatron's own writer forks a process that has grading and heartbeat threads, and spawns a manager that
    imports the main module again; torch's writer makes the same files without either. `group` is the only
    group used, so a thread may save while the main thread trains, if the group is the thread's own.
    """
    if dist.get_rank() == 0:
        torch.save({}, folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    with readable_errors():
        dcp.save(
            torch_strategies.mcore_to_pyt_state_dict({key: [entry] for key, entry in entries.items()}, False),
            # Everything is in host memory. Copying ahead would take CUDA's stream of this thread, and so a context
            # on device 0 for every rank's writing thread.
            storage_writer=dcp.FileSystemWriter(
                folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0
            ),
            planner=torch_strategies.MCoreSavePlanner(
                dedup_replicated_tensors=False,
                flatten_state_dict=False,
                can_run_decentralized_global_plan=False,
            ),
            process_group=group,
        )


def _blocks(policy: Policy) -> Iterator[Block]:
    parameters = global_names(policy.chunks.models)
    for rule in rules(policy.chunks.hf):
        parameter = parameters.get(rule.megatron)
        if parameter is not None:
            yield Block(rule, parameter, owned=rule.exported)


def _stored_here(block: Block) -> bool:
    """Norms are the same on all tensor-parallel ranks: the first one stores them."""
    replicated = isinstance(block.rule.layout, Replicated)
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
    axis = 1 if isinstance(rule.layout, Row) else 0
    rank = parallel_state.get_tensor_model_parallel_rank()
    offsets = [] if isinstance(rule.layout, Replicated) else [(axis, rank, geometry.tensor)]
    pieces = rule.layout.export([shard], _local(geometry))
    return {
        f"{prefix}.{name}": ShardedTensor.from_rank_offsets(
            f"{prefix}.{name}",
            piece.contiguous(),
            *offsets,
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
    return rule.layout.load(_Pieces(prefix, loaded), rule.hf, _local(geometry), 0)
