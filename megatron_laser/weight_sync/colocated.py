"""Weights handed over on one node: the servers open the trainer's memory instead of receiving a copy of it.

On GPUs a bucket stays where it is and only its CUDA IPC handles travel over HTTP; on a CPU the same path uses shared
memory. Every tensor-parallel rank of a server gets handles of its own, since each is counted, and takes its share.
Buckets lie on rank 0's GPU: servers on other GPUs read them through peer access.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from megatron_laser.model import platform
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.sglang_api import UPDATE_WEIGHTS_FROM_TENSOR, from_tensor_body
from megatron_laser.weight_sync.buckets import Bucket, buckets
from megatron_laser.weight_sync.checksums import Checks, ServerLayout
from megatron_laser.weight_sync.fp8 import as_served
from megatron_laser.weight_sync.update import Update

_PHASE = "taking over weights"


class ColocatedTransport:
    """A `WeightTransport` for servers on the trainer's node."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
        seconds: float,
        always_verify: bool,
        layout: ServerLayout | None = None,
        quantized: bool = False,
    ) -> None:
        """What this needs of the machine is asked by `rollout.servers.start_checks`, before anything starts."""
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._seconds = seconds
        self._quantized = quantized
        self._checks = Checks(always=always_verify, layout=layout)

    def send(
        self, engine: SglangEngine, weights: Iterable[tuple[str, torch.Tensor]], version: int, label: str
    ) -> None:
        """See `WeightTransport.send`. Raises SyncFailed.

        The servers have their weights in memory, but not their cache: they stay paused, and `ServerMemory.resume` lets
        them go on when the trainer has made room.
        """
        update = Update(engine, label, seconds=self._seconds)
        digest = self._checks.digest(update.members, version)
        served = as_served(weights, dtype=self._dtype, quantized=self._quantized)
        watched = served if digest is None else digest.watch(served)
        with update.paused(go_on=False):
            update.begin_session()
            for bucket in buckets(watched, self._bucket_bytes):
                self._send_bucket(update, bucket)
            update.end_session()
            self._checks.verify(update, digest, version)

    def close(self) -> None:
        """Free what servers have closed since; nothing else outlives a call of `send`."""
        platform.collect_shared_memory()

    def _send_bucket(self, update: Update, bucket: Bucket) -> None:
        with shareable():
            label = update.label if bucket.last else None
            handles = {member: [_handles(bucket) for _ in range(member.tensor)] for member in update.members}
            update.post_all(
                UPDATE_WEIGHTS_FROM_TENSOR,
                lambda member: from_tensor_body(handles[member], label=label),
                phase=_PHASE,
                seconds=self._seconds,
            )
            update.require_members()
        # Now: what servers have opened is freed only then, and at the end of the sync that would be the whole model.
        platform.collect_shared_memory()


def serialize(bucket: Bucket) -> bytes:
    """[(name, tensor)] as handles to this process's memory, in the form that SGLang takes."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(list(bucket.tensors))
    return buffer.getvalue()


def _handles(bucket: Bucket) -> str:
    return base64.b64encode(serialize(bucket)).decode()


@contextmanager
def shareable() -> Iterator[None]:
    """CPU tensors are shared by file name: by descriptor, the receiver would have to ask this process for them.

    torch starts `torch_shm_manager` for it, which lives as long as a server is connected to it and keeps this process's
    stderr open: whoever reads that through a pipe sees its end only when the servers have ended, too.
    """
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
