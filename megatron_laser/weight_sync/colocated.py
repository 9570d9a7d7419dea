"""Weights handed over on one node: the servers open the trainer's memory instead of receiving a copy of it.

On GPUs a bucket stays where it is and only its CUDA IPC handles travel over HTTP; on a CPU (tests) the same path uses
shared memory. Every tensor-parallel rank of a server gets the same handles and takes its share.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from megatron_laser.config import ConfigError
from megatron_laser.rollout.sglang.engine import SglangEngine
from megatron_laser.weight_sync.buckets import Bucket, buckets
from megatron_laser.weight_sync.checksums import StreamDigest
from megatron_laser.weight_sync.control import Update
from megatron_laser.weight_sync.verify import verify

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
        hashed: bool = False,
    ) -> None:
        """Args: hashed: see `StreamDigest`.

        Raises ConfigError when this process's allocator cannot share its memory.
        """
        refuse_expandable_segments(os.environ)
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._seconds = seconds
        self._verify = always_verify
        self._hashed = hashed
        self._first = True

    def send(
        self, engine: SglangEngine, weights: Iterable[tuple[str, torch.Tensor]], version: int, label: str
    ) -> None:
        """See `WeightTransport.send`. Raises SyncFailed."""
        update = Update(engine, label, seconds=self._seconds)
        digest = StreamDigest(dtype=self._dtype, hashed=self._hashed)
        watched = digest.watch(weights) if self._verify or self._first else weights
        with update.paused():
            update.post_all("/begin_weight_update", {}, phase="begin of the weight update")
            for bucket in buckets(watched, self._bucket_bytes, dtype=self._dtype):
                self._give(update, bucket)
            update.post_all("/end_weight_update", {}, phase="end of the weight update")
            if self._verify or self._first:
                verify(update, digest)
        self._first = False

    def close(self) -> None:
        """Nothing outlives a call of `send`."""
        self._first = True

    def _give(self, update: Update, bucket: Bucket) -> None:
        with shareable():
            payload = base64.b64encode(serialize(bucket)).decode()
            body = {"flush_cache": bucket.last}
            if bucket.last:
                body["weight_version"] = update.label  # type: ignore[assignment]
            update.post_all(
                "/update_weights_from_tensor",
                lambda member: body | {"serialized_named_tensors": [payload] * member.tensor},
                phase=_PHASE,
                seconds=self._seconds,
            )


def serialize(bucket: Bucket) -> bytes:
    """[(name, tensor)] as handles to this process's memory, in the form that SGLang takes."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(list(bucket.tensors))
    return buffer.getvalue()


@contextmanager
def shareable() -> Iterator[None]:
    """CPU tensors are shared by file name: by descriptor, the receiver would have to ask this process for them."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def refuse_expandable_segments(environment: dict[str, str] | os._Environ[str]) -> None:
    """Raises ConfigError: memory of expandable segments cannot be opened by another process's allocator."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environment.get(name, "").replace(" ", "").lower():
            raise ConfigError(
                [
                    f"rollout.weight_sync: colocated with {name}={environment[name]}: memory of expandable segments "
                    "cannot be shared between processes; unset it, or use weight_sync: distributed"
                ]
            )
