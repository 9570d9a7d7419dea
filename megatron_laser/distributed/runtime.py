"""Process groups of a run: one process per device, started by torchrun, or a single process without it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_laser.config import read_architecture
from megatron_laser.config.process_environment import place_in_run
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.communicators import bring_up
from megatron_laser.distributed.rendezvous import rendezvous
from megatron_laser.model import platform
from megatron_laser.model.hf_config import batches_stage_exchange
from megatron_laser.model.transformer_engine import ring_in_pairs


@dataclass(frozen=True)
class Runtime:
    """This process's place in the run.

    store: the rendezvous store, for signals that must not depend on a collective.
    cpu_group: all ranks over gloo; replica_group: the ranks that work on the same samples (one data-parallel
    replica), over gloo; leaders_group: each replica's first rank, over gloo (None on other ranks).
    data_rank, data_size: which replica of how many; context_rank: which share of each sequence within it;
    tensor_rank: which shard of each weight matrix.
    """

    rank: int
    world_size: int
    store: dist.Store
    cpu_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    replica_ranks: tuple[int, ...]
    leaders_group: dist.ProcessGroup | None
    data_rank: int
    data_size: int
    context_rank: int
    tensor_rank: int

    @property
    def is_main(self) -> bool:
        """Global rank 0: it drives the rollout and writes all files."""
        return self.rank == 0

    @property
    def is_replica_leader(self) -> bool:
        """The first rank of its data-parallel replica."""
        return self.rank == self.replica_ranks[0]

    @property
    def reports_rows(self) -> bool:
        """Whether this rank speaks for its rows in sums over all ranks: last stage, first tensor rank.

        Context ranks have rows of their own: each speaks for them.
        """
        return parallel_state.is_pipeline_last_stage(ignore_virtual=True) and self.tensor_rank == 0


def start(config: RunConfig) -> Runtime:
    """Join the process groups, set up Megatron's parallel state and its communicators, and seed every generator.

    Raises RendezvousError when the other ranks do not come within `run.start_grace` seconds, and RuntimeError when a
    group's communicator does not within `run.deadline`.
    """
    platform.install()
    platform.set_local_device(place_in_run().local_rank)
    store, rank, world_size = rendezvous(config.run.start_grace)
    timeout = timedelta(seconds=config.run.deadline)
    # A store keeps the timeout it was made with, even through init_process_group: communicators get their ids from it.
    store.set_timeout(timeout)
    dist.init_process_group(
        platform.collective_backend(),
        store=dist.PrefixStore("process_groups", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    runtime = build_groups(config, store)
    bring_up(
        config.run.deadline,
        paired_stages=not batches_stage_exchange(config.parallel.virtual_pipeline),
        paired_context=ring_in_pairs(config.parallel.context, config.model.layers, config.model.dtype),
        experts=read_architecture(config.model.path).moe is not None,
    )
    return runtime


def build_groups(config: RunConfig, store: dist.Store) -> Runtime:
    """Megatron's parallel state and this project's gloo groups, for the layout of `config`.

    The default process group must exist. Call `parallel_state.destroy_model_parallel()` before calling this
    again for another layout in the same processes; the groups of the one before are then destroyed here, since
    Megatron only forgets them, and each keeps the threads and sockets of its backend.
    """
    if not parallel_state.model_parallel_is_initialized():
        _destroy_earlier_groups()
    parallel, seconds = config.parallel, config.run.deadline
    before = set(_existing_groups())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=config.run.deadline / 60,
        # For Megatron's own optimizer checkpoints only, which are not written here.
        create_gloo_process_groups=False,
    )
    _made.extend(group for group in _existing_groups() if group not in before)
    seed_everything(config.run.seed)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data_rank = parallel_state.get_data_parallel_rank()
    data_size = parallel_state.get_data_parallel_world_size()
    data_ranks: list[int] = [0] * world_size
    dist.all_gather_object(data_ranks, data_rank)
    replicas = [tuple(r for r in range(world_size) if data_ranks[r] == d) for d in range(data_size)]
    # Every rank creates every group, in the same order: new_group is a collective over all ranks.
    cpu_group = gloo_group(None, seconds)
    groups = [gloo_group(ranks, seconds) for ranks in replicas]
    leaders = [ranks[0] for ranks in replicas]
    leaders_group = gloo_group(leaders, seconds)
    return Runtime(
        rank=rank,
        world_size=world_size,
        store=dist.PrefixStore("run", store),
        cpu_group=cpu_group,
        replica_group=groups[data_rank],
        replica_ranks=replicas[data_rank],
        leaders_group=leaders_group if rank in leaders else None,
        data_rank=data_rank,
        data_size=data_size,
        context_rank=parallel_state.get_context_parallel_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
    )


def gloo_group(ranks: Sequence[int] | None, seconds: float) -> dist.ProcessGroup:
    """A group over gloo that ends with the layout. A collective over all ranks, also of those that are not in it.

    Args: ranks: None for all. seconds: deadline of its collectives.
    """
    group = dist.new_group(
        None if ranks is None else list(ranks), backend="gloo", timeout=timedelta(seconds=seconds)
    )
    _made.append(group)
    return group


_made: list[dist.ProcessGroup] = []  # by `build_groups` and for its layout


def _existing_groups() -> list[dist.ProcessGroup]:
    """All process groups that this rank is in; torch has no public list of them."""
    return list(dist.distributed_c10d._world.pg_map)


def _destroy_earlier_groups() -> None:
    existing = set(_existing_groups())
    for group in _made:
        if (
            group in existing
        ):  # a rank is not in all groups that it made, and they may have ended with the default one
            dist.destroy_process_group(group)
    _made.clear()


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's model-parallel generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Leave the process groups; safe to call when they were never joined."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()  # and with it all others
        _made.clear()
