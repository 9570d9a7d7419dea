"""The sharded part of a checkpoint: weights and optimizer state under Hugging Face names.

Every tensor-parallel shard of a Megatron parameter is a contiguous block of one to three Hugging Face tensors
(a rank's query heads are consecutive rows of q_proj, and so on). So the tensors are stored under their Hugging
Face names: `weights.<name>`, and `optimizer.<kind>.<name>`. A checkpoint then knows nothing of pipeline stages,
fused norms or local and Transformer Engine module names, loads into any layout, and converts to a Hugging Face
folder one tensor at a time. Vocabulary padding belongs to a layout, so its shape may differ between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

from megatron_laser.model.mapping import Geometry, Replicated, Row, Rule, Vocabulary, global_names, rules
from megatron_laser.trainer.checkpoint import optimizer_state
from megatron_laser.trainer.checkpoint.together import readable_errors
from megatron_laser.trainer.policy import Policy

WEIGHTS = "weights"


@dataclass(frozen=True)
class _Block:
    """One parameter of this rank, with its rule."""

    rule: Rule
    parameter: torch.nn.Parameter
    owned: bool  # False for the copy of a tied embedding on the last pipeline stage: loaded, not stored


def build_state(policy: Policy) -> dict[str, ShardedTensor]:
    """Everything to be stored, as Megatron ShardedTensors keyed by their names. A collective."""
    for module in policy.chunks.wrapped:
        if module.ddp_config.overlap_param_gather:  # else the weights are those before the last update
            module.start_param_sync(force_sync=True)
    collected = optimizer_state.collect(policy.optimizer)
    entries: dict[str, ShardedTensor] = {}
    for block in _blocks(policy):
        if not block.owned:
            continue
        tensors = {WEIGHTS: block.parameter.detach()}
        for kind, tensor in collected[id(block.parameter)].items():
            # fp32 training updates the weights themselves: there is no other main copy.
            if kind != optimizer_state.MAIN or policy.chunks.config.bf16:
                tensors[f"optimizer.{kind}"] = tensor
        for prefix, tensor in tensors.items():
            entries |= _sharded(prefix, block.rule, tensor, policy.chunks.geometry)
    return entries


@torch.no_grad()
def load_state(policy: Policy, folder: Path, optimizer_step: int) -> None:
    """Load weights and optimizer state from `folder` into the policy, whatever layout stored them."""
    geometry = policy.chunks.geometry
    bf16 = policy.chunks.config.bf16
    blocks = list(_blocks(policy))
    kinds = [kind for kind in optimizer_state.KINDS if kind != optimizer_state.MAIN or bf16]
    wanted: dict[str, ShardedTensor] = {}
    for block in blocks:
        shape = block.parameter.shape
        empty = torch.empty(shape, dtype=block.parameter.dtype)
        wanted |= _sharded(WEIGHTS, block.rule, empty, geometry)
        for kind in kinds:
            wanted |= _sharded(f"optimizer.{kind}", block.rule, torch.empty(shape), geometry)
    with readable_errors():
        loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for block in blocks:
        block.parameter.copy_(_joined(WEIGHTS, block.rule, loaded, geometry))
        state[id(block.parameter)] = {
            kind: _joined(f"optimizer.{kind}", block.rule, loaded, geometry) for kind in kinds
        }
        if not bf16:
            state[id(block.parameter)][optimizer_state.MAIN] = block.parameter.detach().float().cpu()
    optimizer_state.restore(policy.optimizer, state, optimizer_step)


def save_state(entries: dict[str, ShardedTensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Write `entries` in Megatron's torch_dist format into the existing, empty `folder`. A collective on `group`.

    Megatron's own writer forks a process that has grading and heartbeat threads, and spawns a manager that
    imports the main module again; torch's writer makes the same files without either. `group` is the only
    group used, so a thread may save while the main thread trains, if the group is the thread's own.
    """
    if dist.get_rank() == 0:
        torch.save({}, folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    flat, _, _ = torch_strategies._replace_state_dict_keys_with_sharded_keys(
        dict(entries), keep_only_main_replica=True
    )
    with readable_errors():
        dcp.save(
            torch_strategies.mcore_to_pyt_state_dict(flat, False),
            storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True),
            planner=torch_strategies.MCoreSavePlanner(
                dedup_replicated_tensors=False,
                flatten_state_dict=False,
                can_run_decentralized_global_plan=False,
            ),
            process_group=group,
        )


def staged(entries: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """Copies on the CPU, so that training can go on while they are written."""
    return {
        key: replace(entry, data=entry.data.detach().to("cpu", copy=True)) for key, entry in entries.items()
    }


def _blocks(policy: Policy) -> Iterator[_Block]:
    parameters = global_names(policy.chunks.models)
    for rule in rules(policy.chunks.hf):
        parameter = parameters.get(rule.megatron)
        if parameter is not None:
            yield _Block(rule, parameter, owned=rule.exported)


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
    rank = parallel_state.get_tensor_model_parallel_rank()
    replicated = isinstance(rule.layout, Replicated)
    axis = 1 if isinstance(rule.layout, Row) else 0
    offsets = [] if replicated else [(axis, rank, geometry.tensor)]
    replica = (
        0,
        rank if replicated else 0,
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    pieces = rule.layout.export([shard], _local(geometry))
    return {
        f"{prefix}.{name}": ShardedTensor.from_rank_offsets(
            f"{prefix}.{name}",
            piece.contiguous(),
            *offsets,
            replica_id=replica,
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
