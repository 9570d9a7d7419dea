"""Megatron-Core's torch_dist format, and the only module that names what reads and writes it.

Little of `megatron.core.dist_checkpointing` and `torch.distributed.checkpoint` is promised to stay. These were read in
Megatron-Core 0.16.1 and 0.19.2, where they are the same, and torch 2.13: `save_config`, `mcore_to_pyt_state_dict`,
`MCoreSavePlanner`, `MCoreLoadPlanner` and `ShardedTensor` of Megatron; the arguments of torch's `FileSystemWriter`,
its planners' `lookup_object`, `Metadata` and `CheckpointException`, and the names of the files that they write.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_laser.errors import UserError
from megatron_laser.trainer.checkpoint.collective_errors import reason
from megatron_laser.trainer.checkpoint.folder import CheckpointError

#: What the first rank writes beside the ranks' own files.
SHARED_FILES = ("common.pt", "metadata.json", ".metadata")


def rank_prefix(rank: int) -> str:
    """What the names of a rank's own files start with."""
    return f"__{rank}_"


def sharded_tensor(
    key: str,
    local: torch.Tensor,
    *,
    axis: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    allow_shape_mismatch: bool = False,
) -> ShardedTensor:
    """`local` as a part of the tensor stored under `key`.

    Args:
        axis: what the tensor is cut along, into `ranks` equal parts of which `local` is number `rank`; None: not cut.
        allow_shape_mismatch: the stored tensor may be longer or shorter; what it lacks is read as zeros.
    """
    return ShardedTensor.from_rank_offsets(
        key,
        local,
        *([] if axis is None else [(axis, rank, ranks)]),
        allow_shape_mismatch=allow_shape_mismatch,
    )


class Reader:
    """The tensors in a checkpoint's folder, read in one process and without collectives."""

    def __init__(self, folder: Path) -> None:
        self._storage = _IndexedReader(folder)

    def tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """{key: (shape, dtype)} of everything stored."""
        return {
            key: (entry.size, entry.properties.dtype)
            for key, entry in self._storage.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read_into(self, key: str, tensor: torch.Tensor) -> None:
        """Fill `tensor`, which has the shape and dtype of what is stored under `key`."""
        with _without_collectives():
            dcp.load({key: tensor}, storage_reader=self._storage, no_dist=True)

    def read_sharded(self, wanted: Mapping[str, ShardedTensor]) -> None:
        """Fill the tensors of `wanted`; rows that the checkpoint does not have (vocabulary padding) become zeros."""
        with _without_collectives():
            dcp.load(
                torch_strategies.mcore_to_pyt_state_dict(
                    {key: [entry] for key, entry in wanted.items()}, True
                ),
                storage_reader=self._storage,
                planner=torch_strategies.MCoreLoadPlanner(
                    shapes_validation_sharded_tensors=[
                        entry for entry in wanted.values() if not entry.allow_shape_mismatch
                    ],
                    allow_shape_mismatch_sharded_tensors={
                        key: entry for key, entry in wanted.items() if entry.allow_shape_mismatch
                    },
                    flatten_state_dict=False,
                    flatten_sharded_tensors=False,
                ),
                no_dist=True,
            )


def write_sharded(entries: Mapping[str, ShardedTensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Write every rank's `entries` into the existing, empty `folder`. A collective on `group`.

    Megatron's own writer forks a process that has grading and heartbeat threads, and spawns a manager that
    imports the main module again; torch's writer makes the same files without either. `group` is the only
    group used, so a thread may save while the main thread trains, if the group is the thread's own.
    """
    if dist.get_rank() == 0:
        _write_description(folder)
    with _readable_errors():
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


def write_one_by_one(
    placeholders: dict[str, torch.Tensor], make: Callable[[str], torch.Tensor], folder: Path
) -> None:
    """The same files as `write_sharded` on one rank, without collectives: each tensor is made when it is written.

    `placeholders`: tensors of the right shape and type, which may take no memory. `make`: a key's tensor.
    """
    _write_description(folder)
    with _without_collectives():
        dcp.save(
            placeholders,
            storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True),
            planner=_MakingPlanner(make),
            no_dist=True,
        )


def _write_description(folder: Path) -> None:
    torch.save({}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _IndexedReader(dcp.FileSystemReader):
    """Reads the checkpoint's index once: one with thousands of tensors takes a while."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index; the same object each time."""
        if self._index is None:
            self._index = super().read_metadata(*args, **kwargs)
        return self._index


class _MakingPlanner(dcp.DefaultSavePlanner):
    """Asks for each tensor when it is written, so that the model is never in memory as a whole."""

    def __init__(self, make: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._make = make

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._make(index.fqn)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """torch's checkpoint error is no `Exception`, and has every rank's traceback in its text."""
    try:
        yield
    except CheckpointException as error:
        lines = [f"rank {rank}: {reason(inner)}" for rank, (inner, _) in error.failures.items()]
        raise CheckpointError("; ".join(lines)) from error


@contextmanager
def _without_collectives() -> Iterator[None]:
    """torch warns that it reads or writes without collectives; its error names this process as rank 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            inner = next(iter(error.failures.values()))[0]
            if isinstance(inner, UserError):
                raise inner from error
            raise CheckpointError(reason(inner)) from error
