"""Bringing up the communicators of a run in its first minute, where a fault of the network is easy to see.

NCCL makes a group's communicator at the first use of the group: that would be somewhere in the first micro-batch or the
first sync, behind compilations and file systems, and a rank that cannot reach another would look like a slow one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import p2p_communication

from megatron_laser.distributed.heartbeat import end_process
from megatron_laser.model import platform

_BEYOND = 5.0  # seconds that a wait with a deadline of its own gets to end with its own error


def bring_up(
    seconds: float, *, paired_stages: bool, paired_context: bool = False, experts: bool = False
) -> None:
    """One tiny all-reduce in every group that a run uses, and one exchange between neighbours.

    Call on every rank, when Megatron's parallel state is there.

    Args:
        seconds: how long one group may take, `run.deadline`.
        paired_stages: pipeline stages will exchange by single sends and receives, which have communicators of their
            own (Megatron's `batch_p2p_comm` is off).
        paired_context: so will context-parallel ranks, in attention's ring (`transformer_engine.ring_in_pairs`).
        experts: the model has experts, whose groups are used as well.

    Raises:
        RuntimeError: a group of this rank did not come up; names it, its ranks and the cause. Where a call does not
            return at all, the process ends with that message and the watchdog's exit status.
    """
    for name, group in groups(experts=experts):
        _attempt(name, group, seconds, _all_reduce)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if paired_stages and pipeline.size() > 1:
        _attempt("pipeline (neighbours)", pipeline, seconds, _exchange)
    context = parallel_state.get_context_parallel_group()
    if paired_context and context.size() > 1:
        _attempt("context (neighbours)", context, seconds, _around)


def groups(*, experts: bool = False) -> Iterator[tuple[str, dist.ProcessGroup]]:
    """This rank's groups of two ranks and more, each once.

    Every rank has at most one group of each name and the names come in one order, so no two ranks can wait for each
    other in different groups.
    """
    state = parallel_state
    replicas = dict(with_context_parallel=True, with_gtp_remat=False)
    named = {
        "tensor": state.get_tensor_model_parallel_group(),
        "context": state.get_context_parallel_group(),
        "data": state.get_data_parallel_group(**replicas),
        "data (of one optimizer)": state.get_data_parallel_group(**replicas, partial_data_parallel=True),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "model (tensor and pipeline)": state.get_model_parallel_group(),
        "optimizer": state.get_intra_distributed_optimizer_instance_group(),
        "embedding": state.get_embedding_group(check_initialized=False),
    }
    if experts:
        named |= {
            "expert": state.get_expert_model_parallel_group(),
            "expert tensor": state.get_expert_tensor_parallel_group(),
            "expert and expert tensor": state.get_expert_tensor_and_model_parallel_group(),
            "expert data": state.get_expert_data_parallel_group(),
            "expert model (with pipeline)": state.get_expert_tensor_model_pipeline_parallel_group(),
        }
    seen: list[dist.ProcessGroup] = []
    for name, group in named.items():
        # None on ranks in between for the embedding group.
        if group is not None and group.size() > 1 and not any(group is other for other in seen):
            seen.append(group)
            yield name, group


def _attempt(
    name: str, group: dist.ProcessGroup, seconds: float, work: Callable[[dist.ProcessGroup, float], None]
) -> None:
    reason = (
        f"rank {dist.get_rank()}: the communicator of its {name} group, ranks {dist.get_process_group_ranks(group)}, "
        f"did not come up within run.deadline {seconds:g} s: "
    )
    cure = (
        "Another rank of it has failed (see its error), or the nodes do not reach each other: check "
        "NCCL_SOCKET_IFNAME, NCCL_IB_HCA and the firewall; NCCL_DEBUG=INFO says more"
    )
    # NCCL makes a communicator inside the call that first uses it, and such a call has no deadline.
    timer = threading.Timer(
        seconds + _BEYOND, end_process, [f"{reason}the call that makes it does not return. {cure}"]
    )
    timer.daemon = True
    timer.start()
    try:
        work(group, seconds)
    except Exception as error:
        text = " ".join(str(error).split())
        raise RuntimeError(f"{reason}{type(error).__name__}: {text}. {cure}") from error
    finally:
        timer.cancel()


def _all_reduce(group: dist.ProcessGroup, seconds: float) -> None:
    ones = torch.ones(1, device=platform.device())
    _wait(dist.all_reduce(ones, group=group, async_op=True), seconds)
    if int(ones) != group.size():
        raise RuntimeError(f"the sum of {group.size()} ones is {float(ones):g}")


def _exchange(group: dist.ProcessGroup, seconds: float) -> None:
    """What Megatron's interleaved schedule sends and receives, in its own order and through its own groups.

    `_p2p_ops` is private: read in Megatron-Core 0.16.1 and 0.19.2.
    """
    ranks, rank = dist.get_process_group_ranks(group), group.rank()
    buffers = [torch.zeros(1, device=platform.device()) for _ in range(4)]
    requests = p2p_communication._p2p_ops(
        tensor_send_prev=buffers[0],
        tensor_recv_prev=buffers[1],
        tensor_send_next=buffers[2],
        tensor_recv_next=buffers[3],
        group=group,
        prev_pipeline_rank=ranks[rank - 1],
        next_pipeline_rank=ranks[(rank + 1) % len(ranks)],
    )
    for request in requests.values():
        _wait(request, seconds)
    platform.synchronize()


def _around(group: dist.ProcessGroup, seconds: float) -> None:
    """One exchange with both neighbours in the ring, in the order in which Transformer Engine's attention starts it.

    The way back, of gradients, is between the same pairs. Read in Transformer Engine 2.20.2.
    """
    ranks, rank = dist.get_process_group_ranks(group), group.rank()
    sent = torch.full((1,), float(rank), device=platform.device())
    received = torch.empty_like(sent)
    calls = [
        lambda: dist.isend(sent, ranks[(rank + 1) % len(ranks)], group),
        lambda: dist.irecv(received, ranks[rank - 1], group),
    ]
    for work in [call() for call in (calls if rank % 2 == 0 else reversed(calls))]:
        _wait(work, seconds)
    platform.synchronize()
    if int(received) != (rank - 1) % len(ranks):
        raise RuntimeError(f"the rank before sent {float(received):g}")


def _wait(work: Any, seconds: float) -> None:
    if work is not None and not work.wait(timedelta(seconds=seconds)):
        raise RuntimeError("not done")
